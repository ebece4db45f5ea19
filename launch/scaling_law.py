"""How a loss falls with the size of a model, or of what it has seen: L(N) = floor + scale / N^exponent.

Source of the form: OneRec-V2 Technical Report (2025), arXiv 2508.20900; with a floor also Hoffmann et al. (2022).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from scipy.optimize import minimize_scalar

from launch.law_trust import largest_miss

LEAST_SIZES = 4
"""Sizes that a law of three numbers is fitted to, so that it can miss one."""
_EXPONENTS = np.geomspace(1e-3, 3.0, 1000)
"""Where the search for the best one begins."""


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    uncertain: ClassVar[tuple[str, ...]] = ("floor", "exponent")
    num_fitted: ClassVar[int] = 3

    floor: float
    scale: float
    exponent: float
    largest_miss: float = 0.0
    """Share by which the worst of the fitted losses is off."""

    def loss(self, sizes: np.ndarray) -> np.ndarray:
        return self.floor + self.scale / sizes**self.exponent

    def told(self, points: np.ndarray) -> np.ndarray:
        """Shapes: [n, 2] sizes and losses -> [n]."""
        return self.loss(points[:, 0])

    def __str__(self) -> str:
        return f"L(N) = {self.floor:.3f} + {self.scale:.4g} / N^{self.exponent:.3f}"


def fit_law(points: np.ndarray) -> ScalingLaw | None:
    """Least squares, with all three numbers at least 0 and the floor below all losses; None where there are fewer than
    four sizes, or a size or a loss is not above 0, or not finite. Shapes: [n, 2] sizes and losses."""
    points = np.asarray(points, dtype=float)
    if len(points) < LEAST_SIZES or not (np.isfinite(points).all() and points.min() > 0):
        return None
    sizes, losses = points.T
    unit = sizes.min()

    def cost(exponents: np.ndarray) -> np.ndarray:
        powers, floor, drop = _best_line(exponents, sizes / unit, losses)
        return np.square(floor[:, None] + drop[:, None] * powers - losses).sum(1)

    best = cost(_EXPONENTS).argmin()
    around = _EXPONENTS[max(best - 1, 0)], _EXPONENTS[min(best + 1, len(_EXPONENTS) - 1)]
    found = minimize_scalar(lambda exponent: cost(np.array([exponent]))[0], bounds=around, method="bounded")
    exponent = float(found.x)
    _, floor, drop = _best_line(np.array([exponent]), sizes / unit, losses)
    law = ScalingLaw(floor=float(floor[0]), scale=float(drop[0]) * unit**exponent, exponent=exponent)
    return replace(law, largest_miss=largest_miss(law.told(points), losses))


def _best_line(
    exponents: np.ndarray, sizes: np.ndarray, losses: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """With an exponent given, floor and scale are a line through the powers of the sizes.

    Shapes: m exponents, n points -> powers [m, n], floors [m], scales [m].
    """
    powers = sizes ** -exponents[:, None]
    around = powers - powers.mean(1, keepdims=True)
    slope = (around * losses).sum(1) / np.maximum(np.square(around).sum(1), np.finfo(float).tiny)
    floor = np.clip(losses.mean() - slope * powers.mean(1), 0, losses.min())
    scale = ((losses - floor[:, None]) * powers).sum(1) / np.square(powers).sum(1)
    return powers, floor, scale
