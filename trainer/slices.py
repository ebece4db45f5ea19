"""The ranking of held-out items apart by how often these were trained on: what a mean over users hides.

The bounds are those of classic.md 7.1.
"""

from collections.abc import Mapping

import numpy as np
from rich.table import Table

LARGEST = (0, 5, 20)
"""Most training events of the held-out item in each slice but the last."""

Slices = Mapping[str, Mapping[str, int | float]]
"""Training events of the held-out item -> number of users, and means over these."""


def by_training_events(counts: np.ndarray, per_user: Mapping[str, np.ndarray]) -> Slices:
    """Shapes: counts [U] training events of each user's held-out item, per_user [U] each."""
    place = np.searchsorted(LARGEST, counts)
    slices = {}
    for number, name in enumerate(_names()):
        own = place == number
        if own.any():
            means = {metric: float(values[own].mean()) for metric, values in per_user.items()}
            slices[name] = {"num_users": int(own.sum()), **means}
    return slices


def _names() -> list[str]:
    """0, 1 to 5, 6 to 20, more than 20."""
    pairs = zip((-1, *LARGEST), LARGEST, strict=False)
    between = [str(last) if first + 1 == last else f"{first + 1} to {last}" for first, last in pairs]
    return [*between, f"more than {LARGEST[-1]}"]


def render_slices(slices: Slices) -> Table:
    """A line for each metric, a column for each slice."""
    table = Table(title="by training events of the held-out item")
    table.add_column("metric")
    for name in slices:
        table.add_column(name, justify="right")
    for cells in slice_rows(slices):
        table.add_row(*cells)
    return table


def slice_rows(slices: Slices) -> list[list[str]]:
    """Cells of the same table."""
    metrics = dict.fromkeys(metric for means in slices.values() for metric in means)
    return [[metric, *(_shown(means.get(metric)) for means in slices.values())] for metric in metrics]


def _shown(value: int | float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
