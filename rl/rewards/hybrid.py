"""The hybrid reward: preference where the item is relevant, and observed positives never worse than the best.

Source: GenRec (JD.com, 2026; industrial.md 1.4): r = G r_pref with the relevance gate G; a completion that the user
really took gets r_max, the largest r of its group. RECONSTRUCTED: r_max = 1 where all r of the group are 0, since a
correct hit would get no signal.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rl.rewards import RewardFunction, RewardOptions, RewardSetting
from rl.rewards.preference import Preference
from rl.rewards.relevance import Relevance
from rl.types import Group, Reward


class Hybrid(RewardFunction):
    """Shapes: [G] in 0..1 per group; illegal completions are masked where that is asked for."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardOptions):
        preference: Preference.Config = field(default_factory=Preference.Config)
        """What is rewarded where the gate is open."""
        relevance: Relevance.Config = field(default_factory=Relevance.Config)
        """The gate."""
        gate: bool = True
        """Multiply with the relevance gate; without it a learned reward is easily hacked."""
        calibrate: bool = True
        """Give observed positives the largest reward of their group."""
        discard_illegal: bool = False
        """Say nothing of illegal completions, so that items are compared among themselves; the paper gives 0. Another
        reward that has an opinion of them undoes it."""

        def run_names(self) -> tuple[str, ...]:
            return self.preference.run_names()

        def prepared(self, setting: RewardSetting) -> "Hybrid.Config":
            preference = self.preference.prepared(setting)
            relevance = self.relevance.prepared(setting) if self.gate else self.relevance
            return dataclasses.replace(self, preference=preference, relevance=relevance)

        def build(self, setting: RewardSetting) -> "Hybrid":
            gate = self.relevance.build(setting) if self.gate else None
            return Hybrid(self, self.preference.build(setting), gate)

        def to_log(self) -> dict[str, Any]:
            return self.relevance.to_log() if self.gate else {}

    def __init__(self, config: Config, preference: Preference, relevance: Relevance | None):
        self.config, self.preference, self.relevance = config, preference, relevance

    async def score(self, groups: Sequence[Group]) -> list[Reward]:
        rewards = self.preference.preferences(groups)
        if self.relevance is not None:
            rewards = rewards * self.relevance.passes(groups)
        if self.config.calibrate:
            rewards = calibrated(rewards, np.stack([group.is_positive for group in groups]))
        masks = [group.legal if self.config.discard_illegal else None for group in groups]
        return [Reward.of(values, mask) for values, mask in zip(rewards, masks, strict=True)]


def calibrated(rewards: np.ndarray, is_positive: np.ndarray) -> np.ndarray:
    """Shapes: rewards, is_positive [B, G] -> [B, G]."""
    largest = rewards.max(1, keepdims=True)
    return np.where(is_positive, np.where(largest > 0, largest, 1.0), rewards)
