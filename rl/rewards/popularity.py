"""-1 for completions of popular items beyond the share of a group that these may have, 0 for all others.

Source: the industrial reward (SIR) of the OneRec Technical Report (2025; industrial.md 4.2), which multiplies the
reward of viral items by a factor below 1 once they are more than a share of what is shown. RECONSTRUCTED: rewards of a
run are added up, so here it is a penalty that `weight` scales; popular are the items with most training events; and
which completions are too many goes by the order in which they were drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import ConfigError
from data_streams.item_table import ItemTable
from rl.rewards import RewardFunction, RewardOptions, RewardSetting
from rl.types import Group, Reward
from trainer.metrics import head_items


class Popularity(RewardFunction):
    """Shapes: [G] of -1 and 0 per group."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardOptions):
        head_share: float = 0.2
        """Share of the catalogue, by training events, that counts as popular."""
        allowed_share: float = 0.5
        """Share of a group that may be of popular items."""

        def __post_init__(self) -> None:
            if not 0 < self.head_share < 1 or not 0 <= self.allowed_share < 1:
                raise ConfigError(
                    "popularity needs a head-share in 0..1 and an allowed-share of at least 0 and below 1, got "
                    f"{self.head_share} and {self.allowed_share}"
                )

        def build(self, setting: RewardSetting) -> "Popularity":
            counts = ItemTable.load(setting.data_path).train_counts
            return Popularity(self, head_items(counts, self.head_share))

    def __init__(self, config: Config, is_popular: np.ndarray):
        """Shapes: is_popular [N] bool."""
        self.config, self.is_popular = config, is_popular

    async def score(self, groups: Sequence[Group]) -> list[Reward]:
        return [Reward.of(self._penalties(group)) for group in groups]

    def _penalties(self, group: Group) -> np.ndarray:
        popular = group.legal & self.is_popular[np.maximum(group.items, 0)]
        too_many = popular & (popular.cumsum() > self.config.allowed_share * group.size)
        return -too_many.astype(np.float32)
