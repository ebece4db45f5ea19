"""1 for the path of an observed positive, 0 for any other: the rule reward of MiniOneRec and OpenOneRec."""

from collections.abc import Sequence
from dataclasses import dataclass

from rl.rewards import RewardFunction, RewardOptions, RewardSetting
from rl.types import Group, Reward


class Hit(RewardFunction):
    """Shapes: [G] of 0 and 1 per group."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardOptions):
        def build(self, setting: RewardSetting) -> "Hit":
            return Hit()

    async def score(self, groups: Sequence[Group]) -> list[Reward]:
        return [Reward.of(group.is_positive) for group in groups]
