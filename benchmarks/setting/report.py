"""What experiments write after every run: tables in Markdown, and points with their intervals over users."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from matplotlib.axes import Axes

from trainer.metrics import bootstrap_intervals

RESAMPLES = 1_000

Interval = tuple[float, float, float]
"""Mean, low and high end."""


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = (self.head, ("---",) * len(self.head), *self.rows)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_tables(folder: Path, *tables: Table) -> None:
    """Into table.md and onto the screen; tables without rows are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(str(table) for table in tables if table.rows) + "\n"
    (folder / "table.md").write_text(text)
    print(text, flush=True)


def mean_cells(runs: Sequence[pl.DataFrame], metrics: Sequence[str]) -> list[str]:
    """Means over users and seeds; empty where runs lack a metric."""
    lacking = {metric for metric in metrics for run in runs if metric not in run.columns}
    return [
        "" if metric in lacking else f"{sum(run[metric].mean() for run in runs) / len(runs):.4f}"
        for metric in metrics
    ]


def draw_points(axes: Axes, found: Mapping[str, Sequence[pl.DataFrame]], metric: str) -> None:
    """`draw_intervals` of metrics by user."""
    draw_intervals(
        axes, {name: [_interval(run, metric) for run in runs] for name, runs in found.items()}, metric
    )


def _interval(run: pl.DataFrame, metric: str) -> Interval:
    low, high = bootstrap_intervals({metric: run[metric].to_numpy()}, resamples=RESAMPLES)[metric]
    return run[metric].mean(), low, high


def draw_intervals(axes: Axes, found: Mapping[str, Sequence[Interval]], metric: str) -> None:
    """A line for each name; on it a point and a 95 % interval over users for each seed."""
    for place, intervals in enumerate(found.values()):
        for mean, low, high in intervals:
            axes.plot([low, high], [place, place], color="tab:blue", alpha=0.4, linewidth=4)
            axes.plot(mean, place, "o", color="tab:blue")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric}, a point and a 95 % interval over users for each seed")
    axes.grid(axis="x", alpha=0.3)
