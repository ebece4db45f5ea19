"""How completions are drawn, and what probability they then have: one place for rollouts and learners.

Shapes: B users, G completions, L codes.
"""

import torch
from torch import Tensor

from cluster.seeds import purpose_seed
from data_streams.batch import SequenceBatch
from models.decoding.distribution import CodeDistribution
from models.decoding.sampling import Sampling
from models.decoding.space import CatalogueSpace, FreeSpace, PathSpace
from models.decoding.trie import PrefixTrie
from models.generator import Generator
from models.tables import Rows
from rl.configuration import AlignOptions
from rl.types import Completions, Prompts
from sharding.item_index import evaluating


class Drawing:
    """Independent draws of whole paths; free, or only of what the catalogue has."""

    def __init__(
        self,
        options: AlignOptions,
        codes: Tensor,
        code_sizes: tuple[int, ...],
        *,
        seed: int,
        precision: torch.dtype,
    ):
        """Shapes: codes [N, L] of the catalogue."""
        self.options, self.group_size, self.precision = options, options.group_size, precision
        self.is_free = options.space == "free"
        self.seed = purpose_seed(seed, "rollout")
        self.sampling = Sampling.Config(temperature=options.temperature).build()
        trie = PrefixTrie.build(codes.long(), code_sizes)
        self.space: PathSpace = FreeSpace(trie.code_sizes, trie) if self.is_free else CatalogueSpace(trie)

    @property
    def distribution(self) -> CodeDistribution:
        return self.sampling.distribution()

    def draw(
        self, model: Generator, rows: Rows, batch: SequenceBatch, prompts: Prompts, policy_version: int
    ) -> Completions:
        """Encode each prompt once and draw G completions of it; the same ones from the same weights and serials."""
        device = batch.user_ids.device
        seeds = torch.from_numpy(prompts.serials).to(device) + (self.seed >> 8)
        with evaluating(model), self.autocast(device):
            drawn = self.sampling.search(model, rows, batch, self.space, k=self.group_size, seeds=seeds)
        assert self.is_free or bool(drawn.legal.all()), "a constrained completion is illegal"
        return Completions(
            prompts=prompts,
            paths=drawn.paths.cpu().numpy(),
            items=drawn.items.cpu().numpy(),
            log_probs=drawn.code_log_probs.cpu().numpy(),
            policy_version=policy_version,
        )

    def log_probabilities(self, model: Generator, rows: Rows, batch: SequenceBatch, paths: Tensor) -> Tensor:
        """What `draw` stamps on completions, of any paths; the prompt is computed once. Shapes: [B, N, L] fp32."""
        return model.log_probabilities(rows, batch, paths, space=self.space, distribution=self.distribution)

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32)
