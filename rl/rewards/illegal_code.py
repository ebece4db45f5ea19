"""Blame for the code with which a path leaves the catalogue: -1 there, 0 everywhere else.

The codes before it begin real items. A reward of 0 for the whole completion, as in the papers, makes them less likely
too, and hits and utility with them. Give the term `direct`, and let other rewards say nothing of illegal completions
(`--rewards.hybrid.discard-illegal`), so that items are compared among themselves.

RECONSTRUCTED: not in the papers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.errors import ConfigError
from data_streams.semantic_ids import SemanticIdTable
from models.decoding.trie import PrefixTrie
from rl.rewards import RewardFunction, RewardOptions, RewardSetting
from rl.types import Group, Reward


class IllegalCode(RewardFunction):
    """Shapes: [G, L] of 0 and -1 per group, with at most one -1 for a completion."""

    of_codes = True

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardOptions):
        @property
        def rewards_codes(self) -> bool:
            return True

        def build(self, setting: RewardSetting) -> "IllegalCode":
            if not setting.semantic_ids:
                raise ConfigError("the reward illegal-code needs the folder of the items' semantic IDs")
            table = SemanticIdTable.load(setting.semantic_ids)
            return IllegalCode(PrefixTrie.build(torch.from_numpy(table.codes).long(), table.code_sizes))

    def __init__(self, catalogue: PrefixTrie):
        self.catalogue = catalogue

    async def score(self, groups: Sequence[Group]) -> list[Reward]:
        paths = torch.from_numpy(np.stack([group.paths for group in groups]))
        num_levels = paths.shape[-1]
        legal = [self.catalogue.find(paths[..., : depth + 1]) >= 0 for depth in range(num_levels)]
        # Prefixes of an illegal one are legal up to some code, none after it is.
        first_illegal = torch.stack(legal, dim=-1).sum(-1, keepdim=True)
        blamed = torch.arange(num_levels) == first_illegal
        return [Reward.of(-of_group.numpy().astype(np.float32)) for of_group in blamed]
