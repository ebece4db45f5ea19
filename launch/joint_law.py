"""How a loss falls with the size of a model and with what it has seen: L(N, D) = floor + a / N^alpha + b / D^beta.

Source of the form, of the fit (Huber loss of logarithms) and of the split of a budget: Hoffmann et al., Training
Compute-Optimal Large Language Models (2022), arXiv 2203.15556, approach 3. RECONSTRUCTED: operations per target are
c + k N, fitted to those that were counted, in place of 6 N; what reads the catalogue does not grow with the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from scipy.optimize import least_squares, nnls

from launch.scaling_law import largest_miss

LEAST_POINTS = 6
"""Points that a law of five numbers is fitted to, so that it can miss one."""
LEAST_AMOUNTS = 3
"""Sizes, and amounts of data, that are needed to see how either bends."""
_ALIKE = 0.1
"""Amounts of data that differ by less than this share are one."""
_HUBER_DELTA = 1e-3
_MOST_EXPONENT = 3.0
_STARTS = ((0.3, 0.8), (0.1, 0.5, 1.0), (0.1, 0.5, 1.0))
"""Where the search begins: shares of the smallest loss that are the floor, and both exponents."""
_SPLITS = 20_001
"""Sizes that a budget is tried with."""
_LARGEST_LOG = 50.0


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a budget is best spent, by the law."""

    flops: float
    size: float
    targets: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class JointLaw:
    floor: float
    size_scale: float
    size_exponent: float
    data_scale: float
    data_exponent: float
    flops_per_target: float
    """Operations per target that every model needs (c)."""
    flops_per_weight: float
    """Operations per target that each parameter adds (k)."""
    largest_miss: float = 0.0
    """Share by which the worst of the fitted losses is off."""

    def loss(self, sizes: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return (
            self.floor
            + self.size_scale / sizes**self.size_exponent
            + self.data_scale / targets**self.data_exponent
        )

    def operations(self, size: np.ndarray | float) -> np.ndarray | float:
        """Floating-point operations of training per target."""
        return self.flops_per_target + self.flops_per_weight * size

    def best_split(self, flops: float, smallest: float) -> Split | None:
        """Of one budget, the size with the smallest loss, from a hundredth of `smallest` to a million times that; None
        where the loss still falls at either end, which is no best size."""
        sizes = smallest * np.logspace(-2, 6, _SPLITS)
        targets = flops / self.operations(sizes)
        losses = self.loss(sizes, targets)
        best = losses.argmin()
        if best in (0, _SPLITS - 1):
            return None
        return Split(
            flops=flops, size=float(sizes[best]), targets=float(targets[best]), loss=float(losses[best])
        )

    def __str__(self) -> str:
        return (
            f"L(N, D) = {self.floor:.3f} + {self.size_scale:.4g} / N^{self.size_exponent:.3f} + "
            f"{self.data_scale:.4g} / D^{self.data_exponent:.3f}"
        )


def fit_joint_law(
    sizes: Sequence[float],
    targets: Sequence[float],
    losses: Sequence[float],
    flops_per_target: Sequence[float],
) -> JointLaw | None:
    """The law of at least six runs of at least three sizes and three amounts of data; None where there are fewer, or
    where a number is not above 0."""
    numbers = np.array([sizes, targets, losses, flops_per_target], dtype=float)
    if numbers.shape[1] < LEAST_POINTS or not (np.isfinite(numbers).all() and numbers.min() > 0):
        return None
    size, seen, loss, flops = numbers
    if min(num_amounts(size), num_amounts(seen)) < LEAST_AMOUNTS:
        return None
    # Around their middle, so that scales and exponents can be sought apart.
    size_unit, data_unit = (np.exp(np.log(values).mean()) for values in (size, seen))
    fitted = _search(size / size_unit, seen / data_unit, loss)
    floor, size_exponent, data_exponent = fitted[0], fitted[3], fitted[4]
    base, slope = nnls(np.stack((1 / flops, size / flops), axis=1), np.ones_like(flops))[0]
    law = JointLaw(
        floor=float(floor),
        size_scale=float(np.exp(fitted[1]) * size_unit**size_exponent),
        size_exponent=float(size_exponent),
        data_scale=float(np.exp(fitted[2]) * data_unit**data_exponent),
        data_exponent=float(data_exponent),
        flops_per_target=float(base),
        flops_per_weight=float(slope),
    )
    return replace(law, largest_miss=largest_miss(law.loss(size, seen), loss))


def num_amounts(values: Sequence[float]) -> int:
    """How many there are that are not alike. Example: 100, 104 and 200 are two."""
    return 1 + int((np.diff(np.log(np.sort(values))) > np.log1p(_ALIKE)).sum())


def _search(size: np.ndarray, seen: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """The best of several searches: floor, logarithms of both scales, both exponents."""

    def residuals(law: np.ndarray) -> np.ndarray:
        floor, size_scale, data_scale, size_exponent, data_exponent = law
        told = floor + np.exp(size_scale) * size**-size_exponent + np.exp(data_scale) * seen**-data_exponent
        return np.log(told) - np.log(loss)

    low = (0, -_LARGEST_LOG, -_LARGEST_LOG, 0, 0)
    high = (loss.min(), _LARGEST_LOG, _LARGEST_LOG, _MOST_EXPONENT, _MOST_EXPONENT)
    found = []
    for share, size_exponent, data_exponent in product(*_STARTS):
        rest = np.log((np.median(loss) - share * loss.min()) / 2)
        start = (share * loss.min(), rest, rest, size_exponent, data_exponent)
        found.append(
            least_squares(
                residuals, start, bounds=(low, high), loss="huber", f_scale=_HUBER_DELTA, x_scale="jac"
            )
        )
    return min(found, key=lambda result: result.cost).x
