"""The law that the losses of a sweep follow: in the size alone, or where runs saw different amounts, in both."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from launch.joint_law import JointLaw, Split, fit_joint_law
from launch.scaling_law import LEAST_SIZES, ScalingLaw, fit_law
from launch.sweep_picture import FLOPS, LOSS, MODEL_SIZES, SIZES, TARGETS, Row

_BUDGETS = (1, 10, 100)
"""Multiples of the dearest run's operations that the joint law is asked to split."""


def law_of(rows: Sequence[Row], against: str) -> ScalingLaw | JointLaw | None:
    """A joint law of model and data where the runs tell one, or a law of the size alone, or none."""
    if against not in SIZES:
        return None
    return (against in MODEL_SIZES and joint_law_of(rows, against)) or _law_of_size(rows, against)


def _law_of_size(rows: Sequence[Row], against: str) -> ScalingLaw | None:
    """Of the settings with equal size the best one counts, each as the mean over its seeds; of operations, those that
    nothing cheaper is better than."""
    best: dict[float, float] = {}
    for row in _means(rows, against):
        best[row[against]] = min(best.get(row[against], np.inf), row[LOSS])
    if against == FLOPS:
        best = _frontier(best)
    return fit_law([*best], [*best.values()]) if len(best) >= LEAST_SIZES else None


def _frontier(losses: Mapping[float, float]) -> dict[float, float]:
    found, lowest = {}, np.inf
    for cost in sorted(losses):
        if losses[cost] < lowest:
            found[cost] = lowest = losses[cost]
    return found


def joint_law_of(rows: Sequence[Row], size: str) -> JointLaw | None:
    """Of the settings with equal size and equal steps the best one counts, each as the mean over its seeds."""
    best: dict[tuple[float, int], Row] = {}
    for row in _means([row for row in rows if row.get(FLOPS)], size):
        place = row[size], row["step"]
        if place not in best or row[LOSS] < best[place][LOSS]:
            best[place] = row
    sizes, targets, losses, flops = (
        [row[name] for row in best.values()] for name in (size, TARGETS, LOSS, FLOPS)
    )
    return fit_joint_law(sizes, targets, losses, np.divide(flops, targets))


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
