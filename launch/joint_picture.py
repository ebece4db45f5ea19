"""Losses of a sweep over model and data with the joint law of both, as a PNG."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch.joint_law import JointLaw, Split
from launch.plots import as_png
from launch.sweep_picture import FLOPS, LOSS, TARGETS, Row


def draw_joint_law(rows: Sequence[Row], size: str, law: JointLaw, splits: Sequence[Split]) -> bytes:
    """A line of each size against the targets seen, and against operations with what the law says budgets reach."""
    figure, rows = Figure(figsize=(11, 5), layout="constrained"), [row for row in rows if row.get(FLOPS)]
    (data, compute), sizes = figure.subplots(1, 2, sharey=True), sorted({row[size] for row in rows})
    for value, colour in zip(sizes, colormaps["viridis"](np.linspace(0, 0.9, len(sizes))), strict=True):
        own = [row for row in rows if row[size] == value]
        losses = [row[LOSS] for row in own]
        data.plot([row[TARGETS] for row in own], losses, "o", color=colour, label=f"{value:,}")
        compute.plot([row[FLOPS] for row in own], losses, "o", color=colour)
        _draw_size(data, compute, law, value, [row[TARGETS] for row in own], colour)
    if splits:
        budgets, reached = [split.flops for split in splits], [split.loss for split in splits]
        compute.plot(budgets, reached, "k*--", label="best split")
        compute.legend(fontsize=8)
    data.set(xlabel="supervised targets seen", ylabel=LOSS, xscale="log")
    compute.set(xlabel="floating-point operations of the training", xscale="log")
    data.legend(fontsize=8, title=size)
    for axes in (data, compute):
        axes.grid(alpha=0.3)
    figure.suptitle(str(law))
    return as_png(figure)


def _draw_size(
    data: Axes, compute: Axes, law: JointLaw, size: float, targets: Sequence[float], colour: Sequence[float]
) -> None:
    line = np.geomspace(min(targets), max(targets), 50)
    losses = law.loss(np.full_like(line, size), line)
    data.plot(line, losses, "--", color=colour, alpha=0.6)
    compute.plot(line * law.operations(size), losses, "--", color=colour, alpha=0.6)
