"""How a loss falls with the size of a model and with what it has seen: L(N, D) = floor + a / N^alpha + b / D^beta.

Source of the form, of the fit (Huber loss of logarithms) and of the split of a budget: Hoffmann et al., Training
Compute-Optimal Large Language Models (2022), arXiv 2203.15556, approach 3. RECONSTRUCTED: operations per target are
c + k N, fitted to those that were counted, in place of 6 N; what reads the catalogue does not grow with the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import numpy as np
from scipy.optimize import least_squares, nnls

from launch.law_trust import largest_miss

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
_REFIT_EVALUATIONS = 30
"""Of a search that begins near its end; where the points tell nothing of a number, it would wander on."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a budget is best spent, by the law."""

    flops: float
    size: float
    targets: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class JointLaw:
    uncertain: ClassVar[tuple[str, ...]] = ("floor", "size_exponent", "data_exponent")
    num_fitted: ClassVar[int] = 5

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

    def told(self, points: np.ndarray) -> np.ndarray:
        """Shapes: [n, 4] as of `fit_joint_law` -> [n]."""
        return self.loss(points[:, 0], points[:, 1])

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


def fit_joint_law(points: np.ndarray, near: JointLaw | None = None) -> JointLaw | None:
    """The law of at least six runs of at least three sizes and three amounts of data; None where there are fewer, or
    where a number is not above 0. With `near` it is only sought from there.

    Shapes: [n, 4] sizes, targets, operations per target, losses.
    """
    points = np.asarray(points, dtype=float)
    if len(points) < LEAST_POINTS or not (np.isfinite(points).all() and points.min() > 0):
        return None
    size, seen, flops, loss = points.T
    if min(num_amounts(size), num_amounts(seen)) < LEAST_AMOUNTS:
        return None
    # Around their middle, so that scales and exponents can be sought apart.
    units = np.exp(np.log(points[:, :2]).mean(0))
    starts = _starts(loss) if near is None else [_start_at(near, units)]
    evaluations = None if near is None else _REFIT_EVALUATIONS
    fitted = _search(size / units[0], seen / units[1], loss, starts, evaluations)
    floor, size_exponent, data_exponent = fitted[0], fitted[3], fitted[4]
    base, slope = nnls(np.stack((1 / flops, size / flops), axis=1), np.ones_like(flops))[0]
    law = JointLaw(
        floor=float(floor),
        size_scale=float(np.exp(fitted[1]) * units[0] ** size_exponent),
        size_exponent=float(size_exponent),
        data_scale=float(np.exp(fitted[2]) * units[1] ** data_exponent),
        data_exponent=float(data_exponent),
        flops_per_target=float(base),
        flops_per_weight=float(slope),
    )
    return replace(law, largest_miss=largest_miss(law.told(points), loss))


def num_amounts(values: Sequence[float]) -> int:
    """How many there are that are not alike. Example: 100, 104 and 200 are two."""
    return 1 + int((np.diff(np.log(np.sort(values))) > np.log1p(_ALIKE)).sum())


def _starts(loss: np.ndarray) -> list[np.ndarray]:
    """Floor, logarithms of both scales, both exponents."""
    starts = []
    for share, size_exponent, data_exponent in product(*_STARTS):
        rest = np.log((np.median(loss) - share * loss.min()) / 2)
        starts.append(np.array((share * loss.min(), rest, rest, size_exponent, data_exponent)))
    return starts


def _start_at(law: JointLaw, units: np.ndarray) -> np.ndarray:
    exponents = np.array((law.size_exponent, law.data_exponent))
    scales = np.maximum((law.size_scale, law.data_scale) / units**exponents, np.exp(-_LARGEST_LOG))
    return np.array((law.floor, *np.log(scales), *exponents))


def _search(
    size: np.ndarray,
    seen: np.ndarray,
    loss: np.ndarray,
    starts: Sequence[np.ndarray],
    evaluations: int | None,
) -> np.ndarray:
    """The best of several searches: floor, logarithms of both scales, both exponents."""

    def residuals(law: np.ndarray) -> np.ndarray:
        floor, size_scale, data_scale, size_exponent, data_exponent = law
        told = floor + np.exp(size_scale) * size**-size_exponent + np.exp(data_scale) * seen**-data_exponent
        return np.log(told) - np.log(loss)

    low = np.array((0, -_LARGEST_LOG, -_LARGEST_LOG, 0, 0))
    high = np.array((loss.min(), _LARGEST_LOG, _LARGEST_LOG, _MOST_EXPONENT, _MOST_EXPONENT))
    found = [
        least_squares(
            residuals,
            np.clip(start, low, high),
            bounds=(low, high),
            loss="huber",
            f_scale=_HUBER_DELTA,
            x_scale="jac",
            max_nfev=evaluations,
        )
        for start in starts
    ]
    return min(found, key=lambda result: result.cost).x
