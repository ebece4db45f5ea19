"""Whether a completion is an item of the catalogue, of all completions or of a few drawn at random.

Source: the format reward of the OneRec Technical Report (2025; industrial.md 4.2): of 128 completions 5 are drawn at
random; the legal ones get 1, the illegal ones are discarded. Its advantage is 1, not normalised: give the term
`direct`, so that it is added to the advantages as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import ConfigError
from cluster.seeds import purpose_seed
from rl.rewards import RewardFunction, RewardOptions, RewardSetting
from rl.types import Group, Reward


class Legality(RewardFunction):
    """Draws from (seed, prompt), so that a group scored twice gets the same reward."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardOptions):
        num_drawn: int | None = None
        """Completions of a group that are looked at, OneRec takes 5; None looks at all."""
        discard_illegal: bool = True
        """Say nothing of illegal completions, as OneRec does; else they get 0."""

        def __post_init__(self) -> None:
            if self.num_drawn is not None and self.num_drawn < 1:
                raise ConfigError(f"legality needs num-drawn of at least 1 or None, got {self.num_drawn}")

        def build(self, setting: RewardSetting) -> "Legality":
            return Legality(self, setting.seed)

    def __init__(self, config: Config, seed: int):
        self.config, self.seed = config, seed

    async def score(self, groups: Sequence[Group]) -> list[Reward]:
        return [self._score(group) for group in groups]

    def _score(self, group: Group) -> Reward:
        mask = np.ones(group.size, dtype=bool)
        if self.config.num_drawn is not None and self.config.num_drawn < group.size:
            generator = np.random.default_rng(purpose_seed(self.seed, "legality", group.serial))
            mask[:] = False
            mask[generator.choice(group.size, self.config.num_drawn, replace=False)] = True
        if self.config.discard_illegal:
            mask &= group.legal
        return Reward.of(group.legal, mask)
