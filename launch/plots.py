"""Pictures of a run: its numbers over the steps, as a PNG in the run directory."""

import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.storage import Storage
from launch.run_directory import ALIGNMENT_CURVES, CURVES, EXPERTS, SCALING_PICTURE
from trainer.metric_log import read_metrics

_FEW_POINTS = 50
_EXPERTS = "train/experts"
_LOAD = re.compile(rf"{_EXPERTS}/(\d+)/load/(\d+)")


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
    places = list(figure.subplots(2, 2).flat)
    _draw(places, panels, lines)
    places[2].set_yscale("log")
    _write_experts(run_dir, lines)
    return _write(run_dir, CURVES, figure)


def write_alignment_curves(run_dir: str, selection_metric: str) -> str | None:
    """Draw what an alignment did to rewards and users; returns the file, None without numbers."""
    lines = read_metrics(run_dir)
    if not lines:
        return None
    panels = [
        ("reward", ["align/reward"]),
        (f"validation {selection_metric}", [f"validation/{selection_metric}"]),
        ("illegal completions", ["align/hallucination"]),
        ("entropy of completions", ["align/entropy"]),
        ("distance to the stamped log-probability", ["train/log_prob_difference"]),
        ("share of the time", [f"time/{part}_share" for part in ("rollout", "reward", "update", "transfer")]),
    ]
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    _draw(figure.subplots(2, 3).flat, panels, lines)
    return _write(run_dir, ALIGNMENT_CURVES, figure)


def _draw(places: Iterable[Axes], panels: Sequence[tuple[str, Sequence[str]]], lines: Sequence[dict]) -> None:
    for axes, (title, names) in zip(places, panels, strict=True):
        for name in names:
            steps, values = points(lines, name)
            marker = "o" if len(steps) < _FEW_POINTS else None
            axes.plot(steps, values, marker=marker, markersize=3, label=name.partition("/")[2])
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()


def _write_experts(run_dir: str, lines: Sequence[dict]) -> None:
    """Draw how evenly the experts are used, by layer, where the model has any."""
    layers = expert_loads(lines)
    if not layers:
        return
    figure = Figure(figsize=(14, 4), layout="constrained")
    loads, entropy, imbalance = figure.subplots(1, 3)
    most = max(map(len, layers))
    relative = [
        [share * len(layer) for share in layer] + [math.nan] * (most - len(layer)) for layer in layers
    ]
    picture = loads.imshow(relative, aspect="auto", cmap="coolwarm", vmin=0, vmax=2)
    figure.colorbar(picture, ax=loads)
    loads.set(title="load at the end (1 = even)", xlabel="expert", ylabel="layer", yticks=range(len(layers)))
    for axes, title, name in (
        (entropy, "entropy of the loads (1 = even)", "load_entropy"),
        (imbalance, "largest rank's load (1 = even)", "rank_imbalance"),
    ):
        for layer in range(len(layers)):
            axes.plot(*points(lines, f"{_EXPERTS}/{layer}/{name}"), label=f"layer {layer}")
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.3)
    entropy.legend(fontsize=7)
    _write(run_dir, EXPERTS, figure)


def write_scaling(run_dir: str, lines: Sequence[dict]) -> str:
    """Draw what searches find against the candidates they score and against what they compute."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    by_number, by_cost = figure.subplots(1, 2)
    prefixes = sorted(name for name in lines[0] if name.startswith("hrecall"))
    deepest = f"C{len(prefixes) - 1}"
    recall = next(name for name in reversed(lines[0]) if name.startswith("recall@"))
    for kind, style in (("prm", "-"), ("plain", "--")):
        chosen = [line for line in lines if line["kind"] == kind]
        numbers = [line["number"] for line in chosen]
        for color, name in enumerate(prefixes):
            values = [line[name] for line in chosen]
            by_number.plot(numbers, values, f"C{color}{style}o", label=f"{kind} {name}", markersize=3)
        cost = [line["gflop_per_user"] for line in chosen]
        by_cost.plot(cost, [line[recall] for line in chosen], f"k{style}o", label=f"{kind} {recall}")
        by_cost.plot(
            cost,
            [line[prefixes[-1]] for line in chosen],
            f"{deepest}{style}o",
            label=f"{kind} {prefixes[-1]}",
        )
    runs = dict.fromkeys(line["run"] for line in lines if line["kind"] == "beside")
    for color, run in enumerate(runs, start=len(prefixes)):
        chosen, name = [line for line in lines if line.get("run") == run], PurePath(run).name
        cost = [line["gflop_per_user"] for line in chosen]
        of_prefix, of_items = ([line[metric] for line in chosen] for metric in (prefixes[-1], recall))
        by_number.plot(
            [line["number"] for line in chosen], of_prefix, f"C{color}-.s", label=f"{name} {prefixes[-1]}"
        )
        by_cost.plot(cost, of_prefix, f"C{color}-.s", label=f"{name} {prefixes[-1]}")
        by_cost.plot(cost, of_items, f"C{color}:s", label=f"{name} {recall}")
    by_number.set(xlabel="candidates of the PRM (K+), or width of a plain beam", xscale="log")
    by_cost.set(xlabel="GFLOP per user", xscale="log")
    for axes in (by_number, by_cost):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return _write(run_dir, SCALING_PICTURE, figure)


def expert_loads(lines: Sequence[dict]) -> list[list[float]]:
    """Share of the tokens that visited each expert, by layer, where it was last reported."""
    reported = [line for line in lines if f"{_EXPERTS}/0/load/0" in line]
    if not reported:
        return []
    layers: dict[int, dict[int, float]] = {}
    for name, value in reported[-1].items():
        if found := _LOAD.fullmatch(name):
            layers.setdefault(int(found[1]), {})[int(found[2])] = value
    return [[loads[expert] for expert in sorted(loads)] for _, loads in sorted(layers.items())]


def _write(run_dir: str, name: str, figure: Figure) -> str:
    storage = Storage(run_dir)
    storage.write(name, as_png(figure))
    return storage.path(name)


def as_png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def points(lines: Sequence[dict], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one number, where it was reported."""
    chosen = [line for line in lines if name in line]
    return [line["step"] for line in chosen], [line[name] for line in chosen]
