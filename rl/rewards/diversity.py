"""How unlike the others of its group a completion is: 1 - mean cosine to them; 0 for an illegal one.

RECONSTRUCTED: the field's systems speak of list diversity without a formula. The mean over a group is the intra-list
diversity that evaluation reports. A repeated item has cosine 1 with its twin.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rl.item_vectors import UnitVectors
from rl.rewards import RewardFunction, RewardOptions, RewardSetting
from rl.types import Group, Reward


class Diversity(RewardFunction):
    """Shapes: [G] in 0..2 per group."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardOptions):
        vectors: str | None = None
        """Matrix (.npy) with a vector for each item row; None takes the data set's own embeddings."""

        def build(self, setting: RewardSetting) -> "Diversity":
            return Diversity(UnitVectors.load(setting.data_path, self.vectors))

    def __init__(self, vectors: UnitVectors):
        self.vectors = vectors

    async def score(self, groups: Sequence[Group]) -> list[Reward]:
        items = np.stack([group.items for group in groups])
        legal, vectors = items >= 0, self.vectors(items)
        cosines = np.einsum("bge,bhe->bgh", vectors, vectors)
        others = legal[:, None, :] & ~np.eye(items.shape[1], dtype=bool)
        mean = (cosines * others).sum(-1) / np.maximum(others.sum(-1), 1)
        return [Reward.of(values) for values in np.where(legal & others.any(-1), 1 - mean, 0.0)]
