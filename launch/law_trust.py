"""How far a fitted law can be trusted: intervals of its numbers, and what it foretells of a size it has not seen.

Both are asked for by the methodology of Hoffmann et al. (2022) and of what followed it (classic.md 8.2, 8.4).
RECONSTRUCTED: the bootstrap is one of residuals, on the scale of logarithms and widened by the numbers that were
fitted: of five points themselves there are too few different samples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

_DRAWS = 100
_QUANTILES = (0.025, 0.975)


class Law(Protocol):
    """What was fitted to points [n, c], whose first column is the size and the last one the loss."""

    uncertain: tuple[str, ...]
    """Its numbers that intervals are of."""
    num_fitted: int
    """How many numbers were fitted."""

    def told(self, points: np.ndarray) -> np.ndarray:
        """The losses it tells of points. Shapes: [n, c] -> [n]."""


Fit = Callable[[np.ndarray], Law | None]


@dataclass(frozen=True, kw_only=True)
class Trust:
    intervals: Mapping[str, tuple[float, float]]
    """95 % of each uncertain number."""
    largest: float
    """The largest size."""
    miss_at_largest: float | None
    """Share by which the law fitted without that size is off there at worst; None where too few others are left."""
    best_of_smaller: float
    """Share by which the least loss of the smaller sizes is off there at worst: what a law must beat."""

    def __str__(self) -> str:
        """One line."""
        shown = [f"{name} {low:.3f} to {high:.3f}" for name, (low, high) in self.intervals.items()]
        text = f"95 %: {', '.join(shown).replace('_', ' ')}"
        if self.miss_at_largest is None:
            return text
        return (
            f"{text}; fitted without {self.largest:,.0f} it is off there by {100 * self.miss_at_largest:.1f} % (the "
            f"best loss of the smaller ones by {100 * self.best_of_smaller:.1f} %)"
        )


def trust_in(law: Law, points: np.ndarray, *, fit: Fit, refit: Fit) -> Trust:
    """`fit` is how the law came about, `refit` the same near it, which may be quicker. Shapes: points [n, c]."""
    size, loss = points[:, 0], points[:, -1]
    is_largest = size == size.max()
    others = fit(points[~is_largest]) if not is_largest.all() else None
    least = loss[~is_largest].min(initial=np.inf)
    miss = None if others is None else largest_miss(others.told(points[is_largest]), loss[is_largest])
    return Trust(
        intervals=_intervals(law, points, refit),
        largest=float(size.max()),
        miss_at_largest=miss,
        best_of_smaller=largest_miss(least, loss[is_largest]),
    )


def _intervals(law: Law, points: np.ndarray, refit: Fit) -> dict[str, tuple[float, float]]:
    told, count = law.told(points), len(points)
    residuals = np.log(points[:, -1] / told)
    residuals = (residuals - residuals.mean()) * (count / max(count - law.num_fitted, 1)) ** 0.5
    random, laws = np.random.default_rng(0), []
    for _ in range(_DRAWS):
        drawn = told * np.exp(random.choice(residuals, count))
        laws.append(refit(np.column_stack((points[:, :-1], drawn))))
    found = [one for one in laws if one is not None]
    return {
        name: tuple(map(float, np.quantile([getattr(one, name) for one in found], _QUANTILES)))
        for name in law.uncertain
    }


def largest_miss(told: np.ndarray | float, losses: np.ndarray) -> float:
    """Share by which the worst of some losses is off. Shapes: twice [n]."""
    return float(np.abs(told / losses - 1).max())
