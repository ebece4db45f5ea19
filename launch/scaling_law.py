"""How a loss falls with the size of a model, or of what it has seen: L(N) = floor + scale / N^exponent.

Source of the form: OneRec-V2 Technical Report (2025), arXiv 2508.20900; with a floor also Hoffmann et al. (2022).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import curve_fit

LEAST_SIZES = 4
"""Sizes that a law of three numbers is fitted to, so that it can miss one."""


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    floor: float
    scale: float
    exponent: float
    largest_miss: float = 0.0
    """Share by which the worst of the fitted losses is off."""

    def loss(self, sizes: np.ndarray) -> np.ndarray:
        return self.floor + self.scale / sizes**self.exponent

    def __str__(self) -> str:
        return f"L(N) = {self.floor:.3f} + {self.scale:.4g} / N^{self.exponent:.3f}"


def fit_law(sizes: Sequence[float], losses: Sequence[float]) -> ScalingLaw | None:
    """Least squares, with all three numbers at least 0; None where a size or a loss is not above 0, or not finite."""
    sizes, losses = np.asarray(sizes, dtype=float), np.asarray(losses, dtype=float)
    if not (np.isfinite([sizes, losses]).all() and min(sizes.min(), losses.min()) > 0):
        return None
    unit = sizes.min()
    fitted, _ = curve_fit(
        lambda size, floor, drop, exponent: floor + drop * (size / unit) ** -exponent,
        sizes,
        losses,
        p0=(losses.min(), max(np.ptp(losses), 1e-3), 0.3),
        bounds=(0, (losses.min(), np.inf, 3.0)),
        max_nfev=20_000,
    )
    floor, drop, exponent = map(float, fitted)
    law = ScalingLaw(floor=floor, scale=drop * unit**exponent, exponent=exponent)
    return replace(law, largest_miss=largest_miss(law.loss(sizes), losses))


def largest_miss(told: np.ndarray, losses: np.ndarray) -> float:
    """Share by which the worst of some losses is off. Shapes: twice [n]."""
    return float(np.abs(told / losses - 1).max())
