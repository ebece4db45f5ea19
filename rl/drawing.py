"""How completions are drawn, and what probability they then have: one place for rollouts and learners.

Shapes: B users, G completions, L codes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.seeds import purpose_seed
from data_streams.batch import SequenceBatch
from models.decoding.beam_search import BeamSearch
from models.decoding.distribution import CodeDistribution, path_log_probabilities
from models.decoding.gumbel import GumbelSampling
from models.decoding.sampling import Sampling
from models.decoding.search import PathSearch, check_width
from models.decoding.space import CatalogueSpace, FreeSpace, PathSpace
from models.decoding.trie import PrefixTrie
from models.generator import Generator
from models.tables import Rows
from rl.configuration import AlignOptions
from rl.types import Completions, Prompts
from sharding.item_index import evaluating


class Drawing:
    """Draws of whole paths; free, or only of what the catalogue has."""

    def __init__(
        self,
        options: AlignOptions,
        codes: Tensor,
        code_sizes: tuple[int, ...],
        *,
        seed: int,
        precision: torch.dtype,
    ):
        """Shapes: codes [N, L] of the catalogue.

        Raises: ConfigError where completions are to be different and there are not that many.
        """
        self.options, self.group_size, self.precision = options, options.group_size, precision
        self.is_free = options.space == "free"
        self.seed = purpose_seed(seed, "rollout")
        self.search = _search(options)
        trie = PrefixTrie.build(codes.long(), code_sizes)
        self.space: PathSpace = FreeSpace(trie.code_sizes, trie) if self.is_free else CatalogueSpace(trie)
        if options.draws != "independent":
            check_width("align.group-size", self.group_size, self.space)

    @property
    def distribution(self) -> CodeDistribution:
        return self.search.distribution()

    def draw(
        self, model: Generator, rows: Rows, batch: SequenceBatch, prompts: Prompts, policy_version: int
    ) -> Completions:
        """Encode each prompt once and draw G completions of it; the same ones from the same weights and serials."""
        device = batch.user_ids.device
        seeds = torch.from_numpy(prompts.serials).to(device) + (self.seed >> 8)
        with evaluating(model), self.autocast(device):
            drawn = self.search.search(model, rows, batch, self.space, k=self.group_size, seeds=seeds)
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
        return self.of_logits(model.path_logits(rows, batch, paths), paths)

    def of_logits(self, logits: Sequence[Tensor], paths: Tensor) -> Tensor:
        """The same from teacher-forced scores. Shapes: L times [B, N, K_l], paths [B, N, L] -> [B, N, L] fp32."""
        return path_log_probabilities(logits, paths, self.space, self.distribution)

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32)


def _search(options: AlignOptions) -> PathSearch:
    """All of them give the log-probabilities of one distribution: a path's own, whichever others are drawn."""
    if options.draws == "independent":
        return Sampling.Config(temperature=options.temperature).build()
    if options.draws == "distinct":
        return GumbelSampling.Config(temperature=options.temperature).build()
    beam = BeamSearch.Config(width=options.group_size, over="allowed", temperature=options.temperature)
    return beam.build()


def likelihood(logits: Sequence[Tensor], paths: Tensor) -> Tensor:
    """Log-probabilities of the bare model, which pretraining maximises, whatever completions are drawn from.

    Among the items of the catalogue alone, illegal paths would cost nothing, and drift up while completions are drawn
    there.

    Shapes: L times [B, N, K_l], paths [B, N, L] (-1 for none) -> [B, N, L] fp32.
    """
    everything = FreeSpace(tuple(of_level.shape[-1] for of_level in logits))
    return path_log_probabilities(logits, paths, everything, CodeDistribution())
