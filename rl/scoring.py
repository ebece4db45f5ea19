"""From the completions of a step to what each learner learns from: rewards and advantages.

Rank 0 drives the reward pool; the others wait for their share, however long its workers take.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from cluster.errors import PoolGoneError
from cluster.process import Process
from rl.advantages import AdvantageEstimator
from rl.heartbeat import Heartbeat
from rl.reward_mix import MixedRewards
from rl.reward_pool import Rewards
from rl.stopwatch import Stopwatch
from rl.types import Advantages, Completions, Group
from sharding.collectives import scatter_objects

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One rank's completions and how good they are."""

    completions: Completions
    advantages: Advantages
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What the completions of all ranks were like; empty where no rank had any."""


class Scorer:
    """Rewards and advantages of a step; `score` is a collective call."""

    def __init__(
        self,
        rewards: Rewards | None,
        estimator: AdvantageEstimator,
        process: Process,
        watch: Stopwatch,
        heartbeat: Heartbeat,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        """`stop_requested` ends the wait for rewards, whose step is then given up."""
        self.stop_requested = stop_requested
        self.rewards, self.estimator, self.process = rewards, estimator, process
        self.watch, self.heartbeat = watch, heartbeat

    def score(self, drawn: list[Completions] | None) -> Scored | None:
        """This rank's share of what rank 0 was given, one entry per rank; None where the step must be given up.

        Raises: RewardError on rank 0 for a reward that is none.
        """
        shares: list[Scored | None] | None = None
        if self.process.rank == 0:
            shares = [None] * self.process.world_size if drawn is None else self._shares(drawn)
        self.heartbeat.end()
        return scatter_objects(shares, self.process)

    def _shares(self, drawn: list[Completions]) -> list[Scored | None]:
        if not any(part.prompts.num_users for part in drawn):
            # Long users have used up the budget of this step, and no reward must know how to score nobody.
            return [
                Scored(completions=part, advantages=Advantages.of_nobody(part.paths.shape[1]))
                for part in drawn
            ]
        try:
            with self.watch.measure("reward"):
                mixed = self._rewards_of([group for part in drawn for group in part.groups()])
        except PoolGoneError as error:
            logger.error("%s", error)
            mixed = None
        if mixed is None:
            return [None] * len(drawn)
        advantages = mixed.advantages(self.estimator)
        numbers = describe(drawn, mixed, advantages)
        cuts = np.cumsum([part.prompts.num_users for part in drawn])[:-1]
        return [
            Scored(completions=part, advantages=own, numbers=numbers)
            for part, own in zip(drawn, _split(advantages, cuts), strict=True)
        ]

    def _rewards_of(self, groups: list[Group]) -> MixedRewards | None:
        """None where the run is to stop before they are there."""
        ticket = self.rewards.submit(groups)
        while not self.rewards.wait(ticket, self.heartbeat.every_s):
            if self.stop_requested():
                return None
            self.heartbeat.beat()
        return self.rewards.collect(ticket)


def _split(advantages: Advantages, cuts: np.ndarray) -> list[Advantages]:
    parts = (np.split(array, cuts) for array in (advantages.values, advantages.mask, advantages.skipped))
    return [
        Advantages(values=values, mask=mask, skipped=skipped)
        for values, mask, skipped in zip(*parts, strict=True)
    ]


def describe(drawn: list[Completions], mixed: MixedRewards, advantages: Advantages) -> dict[str, float]:
    """Numbers of a step for the log and the guards; the entropy is estimated by the completions' -log p."""
    values = mixed.values if mixed.values.ndim == 2 else mixed.values.sum(-1)
    legal = np.concatenate([part.legal for part in drawn])
    log_probs = np.concatenate([part.log_probs.sum(-1) for part in drawn])
    items = np.concatenate([part.items for part in drawn])
    hits = [group.is_positive.any() for part in drawn for group in part.groups()]
    distinct = (np.diff(np.sort(items, axis=1), axis=1) > 0).sum(1) + 1
    return {
        "reward": float(values[mixed.mask].mean()) if mixed.mask.any() else 0.0,
        "hallucination": float(1 - legal.mean()),
        "entropy": float(-log_probs.mean()),
        "hit": float(np.mean(hits)),
        "distinct": float(distinct.mean() / items.shape[1]),
        "skipped": float(advantages.skipped.mean()),
        **{f"reward/{name}": value for name, value in mixed.report.items()},
    }
