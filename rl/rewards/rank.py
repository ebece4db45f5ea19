"""A penalty for what stands high and is wrong, in groups that hold a hit.

Source: the public code of MiniOneRec (`ndcg_rule_reward`): completions are ranked as the generator ranks them; the
wrong one at place k (from 0) gets -w_k with w_k = 1 / log2(k + 2), scaled to sum to 1 over the group. Groups without a
hit get 0. Meant to be added to the hit reward with the same weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rl.rewards import RewardFunction, RewardOptions, RewardSetting
from rl.types import Group, Reward


class Rank(RewardFunction):
    """Shapes: [G] in -1..0 per group."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardOptions):
        def build(self, setting: RewardSetting) -> "Rank":
            return Rank()

    async def score(self, groups: Sequence[Group]) -> list[Reward]:
        return [Reward.of(_penalties(group)) for group in groups]


def _penalties(group: Group) -> np.ndarray:
    is_hit = group.is_positive
    if not is_hit.any():
        return np.zeros(group.size)
    weights = 1 / np.log2(np.arange(group.size) + 2)
    places = np.empty(group.size, dtype=np.int64)
    places[np.argsort(-group.log_probs, kind="stable")] = np.arange(group.size)
    return np.where(is_hit, 0.0, -(weights / weights.sum())[places])
