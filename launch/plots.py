"""Pictures of a run: its numbers over the steps, as a PNG in the run directory."""

import io
from collections.abc import Sequence

from matplotlib.figure import Figure

from cluster.storage import Storage
from launch.run_directory import CURVES
from trainer.metric_log import read_metrics

_FEW_POINTS = 50


def write_curves(run_dir: str, selection_metric: str) -> str | None:
    """Draw loss, validation metric, learning rates and throughput; returns the file, None without numbers."""
    lines = read_metrics(run_dir)
    if not lines:
        return None
    panels = [
        ("training loss", ["train/loss"]),
        (f"validation {selection_metric}", [f"validation/{selection_metric}"]),
        ("learning rate", ["train/learning_rate", "train/table_learning_rate"]),
        ("supervised targets per second", ["train/targets_per_s"]),
    ]
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for name in names:
            steps, values = points(lines, name)
            marker = "o" if len(steps) < _FEW_POINTS else None
            axes.plot(steps, values, marker=marker, markersize=3, label=name.partition("/")[2])
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.set_yscale("log")
            axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    storage = Storage(run_dir)
    storage.write(CURVES, picture.getvalue())
    return storage.path(CURVES)


def points(lines: Sequence[dict], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one number, where it was reported."""
    chosen = [line for line in lines if name in line]
    return [line["step"] for line in chosen], [line[name] for line in chosen]
