"""A number of the runs of a sweep against their size or one of their options, as a PNG."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch.plots import as_png
from launch.scaling_law import ScalingLaw

LOSS, TARGETS, FLOPS = "loss", "targets", "flops"
MODEL_SIZES = {"parameters": "trained parameters outside of tables", "blocks": "parameters of the blocks"}
SIZES = {
    **MODEL_SIZES,
    TARGETS: "supervised targets seen",
    FLOPS: "floating-point operations of the training",
}
"""What a number may be drawn against, and a loss fitted to, beside any option of the sweep."""
_MOST_SERIES = 10
_LOG_RANGE = 5
"""Sizes that differ by more than this factor stand on a logarithmic axis."""

Row = dict[str, Any]


def draw_sweep(
    rows: Sequence[Row], options: Sequence[str], against: str, metric: str, law: ScalingLaw | None
) -> bytes:
    """Means over seeds with their range; a line for each setting of the options that leave the size as it is."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, beside = figure.subplots(), options_beside(rows, options, against)
    series = defaultdict(lambda: defaultdict(list))
    for row, size in zip(rows, _numbers([row[against] for row in rows]), strict=True):
        series[" ".join(f"{name}={row.get(name, '')}" for name in beside)][size].append(row[metric])
    for label, values in series.items():
        _draw(axes, values, label)
    if law is not None:
        sizes = np.array([row[against] for row in rows], dtype=float)
        line = np.geomspace(sizes.min(), sizes.max(), 100)
        axes.plot(line, law.loss(line), "k--", alpha=0.5)
        axes.set_title(str(law))
    axes.set(xlabel=SIZES.get(against, against), ylabel=metric)
    axes.grid(alpha=0.3)
    if beside and len(series) <= _MOST_SERIES:
        axes.legend(fontsize=8)
    return as_png(figure)


def options_beside(rows: Sequence[Row], options: Sequence[str], against: str) -> list[str]:
    """The options that runs differ in while all the others, and what is drawn against, are alike."""
    found = []
    for name in options:
        groups = defaultdict(lambda: (set(), set()))
        for row in rows:
            values, sizes = groups[tuple(row.get(other) for other in options if other != name)]
            values.add(row.get(name))
            sizes.add(row[against])
        varied = [sizes for values, sizes in groups.values() if len(values) > 1]
        if varied and all(len(sizes) == 1 for sizes in varied):
            found.append(name)
    return found


def _draw(axes: Axes, by_size: Mapping[float, list[float]] | Mapping[str, list[float]], label: str) -> None:
    sizes = list(by_size) if isinstance(next(iter(by_size)), str) else sorted(by_size)
    means = np.array([np.mean(by_size[size]) for size in sizes])
    below = means - [min(by_size[size]) for size in sizes]
    above = [max(by_size[size]) for size in sizes] - means
    axes.errorbar(sizes, means, yerr=[below, above], marker="o", capsize=3, label=label or None)
    if isinstance(sizes[0], float) and sizes[0] > 0 and sizes[-1] > _LOG_RANGE * sizes[0]:
        axes.set_xscale("log")


def _numbers(values: Sequence[Any]) -> list[float] | list[str]:
    """Values of an option as they were written, as numbers where all of them are; else each has a place of its own."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return [str(value) for value in values]
