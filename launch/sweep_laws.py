"""The law that the losses of a sweep follow: in the size alone, or where runs saw different amounts, in both."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from launch.joint_law import JointLaw, Split, fit_joint_law
from launch.law_trust import Trust, trust_in
from launch.scaling_law import ScalingLaw, fit_law
from launch.sweep_picture import FLOPS, LOSS, MODEL_SIZES, SIZES, TARGETS, Row

_BUDGETS = (1, 10, 100)
"""Multiples of the dearest run's operations that the joint law is asked to split."""


@dataclass(frozen=True, kw_only=True)
class FittedLaw:
    law: ScalingLaw | JointLaw
    trust: Trust


def law_of(rows: Sequence[Row], against: str) -> FittedLaw | None:
    """A joint law of model and data where the runs tell one, or a law of the size alone, or none."""
    if against not in SIZES:
        return None
    if against in MODEL_SIZES:
        points = _points_of_both(rows, against)
        if (joint := fit_joint_law(points)) is not None:
            refit = partial(fit_joint_law, near=joint)
            return FittedLaw(law=joint, trust=trust_in(joint, points, fit=fit_joint_law, refit=refit))
    points = _points_of_size(rows, against)
    law = fit_law(points)
    return law and FittedLaw(law=law, trust=trust_in(law, points, fit=fit_law, refit=fit_law))


def _points_of_size(rows: Sequence[Row], against: str) -> np.ndarray:
    """Of the settings with equal size the best one counts, each as the mean over its seeds; of operations, those that
    nothing cheaper is better than. Shapes: [n, 2] sizes and losses."""
    best: dict[float, float] = {}
    for row in _means(rows, against):
        best[row[against]] = min(best.get(row[against], np.inf), row[LOSS])
    if against == FLOPS:
        best = _frontier(best)
    return np.array([*best.items()], dtype=float).reshape(-1, 2)


def _frontier(losses: Mapping[float, float]) -> dict[float, float]:
    found, lowest = {}, np.inf
    for cost in sorted(losses):
        if losses[cost] < lowest:
            found[cost] = lowest = losses[cost]
    return found


def _points_of_both(rows: Sequence[Row], size: str) -> np.ndarray:
    """Of the settings with equal size and equal steps the best one counts, each as the mean over its seeds.

    Shapes: [n, 4] sizes, targets, operations per target, losses.
    """
    best: dict[tuple[float, int], Row] = {}
    for row in _means([row for row in rows if row.get(FLOPS)], size):
        place = row[size], row["step"]
        if place not in best or row[LOSS] < best[place][LOSS]:
            best[place] = row
    points = [
        (row[size], row[TARGETS], row[FLOPS] / max(row[TARGETS], 1), row[LOSS]) for row in best.values()
    ]
    return np.array(points, dtype=float).reshape(-1, 4)


def _means(rows: Sequence[Row], size: str) -> list[Row]:
    """A row for each setting, with means over its seeds; of what each has seen and spent too, where seeds differ."""
    of_setting = defaultdict(list)
    for row in rows:
        of_setting[row["run"].rpartition("_seed-")[0]].append(row)
    names = dict.fromkeys((size, TARGETS, LOSS, FLOPS, "step"))
    return [
        {name: float(np.mean([row.get(name) or 0 for row in seeds])) for name in names}
        for seeds in of_setting.values()
    ]


def best_splits(law: JointLaw, rows: Sequence[Row], size: str) -> list[Split]:
    """How a law would spend what the dearest run took, and multiples of that, where it knows a best size."""
    dearest = max(row.get(FLOPS) or 0 for row in rows)
    smallest = min(row[size] for row in rows)
    splits = [law.best_split(dearest * times, smallest) for times in _BUDGETS]
    return [split for split in splits if split is not None]
