"""Sampling without replacement: k different paths, as if drawn one after another and never put back.

Source: Kool, van Hoof and Welling, Stochastic Beams and Where to Find Them (2019), algorithm 1.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.decoding.distribution import NOTHING, CodeDistribution
from models.decoding.random_numbers import gumbel
from models.decoding.ranking import best_cells
from models.decoding.sampling import check_seeds
from models.decoding.search import Decoded, PathSearch, Step, check_width, next_logits
from models.decoding.space import PathSpace
from models.generator import DecodeState, Generator

ROOT = -1
"""Stands for the level of the empty prefix."""


class GumbelSampling(PathSearch):
    """k different paths in the order drawn, by a beam search over log-probabilities perturbed by Gumbel noise.

    A prefix's perturbed value is the largest of its paths', so a beam of k prefixes holds the k best paths.
    Scores are the perturbed values, which importance weights need. A path of several items gives them all, in
    their order, until k slots are full.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        temperature: float = 1.0
        """Divides the scores of every level; above 1 for more variety."""
        top_k: int | None = None
        """Only the k most likely codes of a prefix can be drawn; None keeps all."""
        top_p: float = 1.0
        """Only the most likely codes that hold this much probability together can be drawn."""

        def build(self) -> "GumbelSampling":
            return GumbelSampling(self)

    def __init__(self, config: Config):
        self._distribution = CodeDistribution(
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
        )

    def distribution(self) -> CodeDistribution:
        return self._distribution

    def check(self, model: Generator, space: PathSpace, k: int, num_users: int) -> None:
        super().check(model, space, k, num_users)
        check_width("the number of draws without replacement", k, space)

    def search_from(
        self, model: Generator, state: DecodeState, space: PathSpace, *, k: int, seeds: Tensor | None = None
    ) -> Decoded:
        check_seeds(seeds, state.num_users)
        kept = None
        for level in range(len(space.code_sizes)):
            logits, state = next_logits(model, state, level, kept, space)
            if kept is None:
                kept = replace(Step.root(state), scores=gumbel(seeds[:, None], ROOT))
            kept = self._extend(kept, level, logits, space, k, seeds)
        return kept.decoded(space, k)

    def _extend(
        self, kept: Step, level: int, logits: Tensor, space: PathSpace, k: int, seeds: Tensor
    ) -> Step:
        candidates = space.candidates(level, kept.nodes)
        of_codes = self._distribution.log_probabilities(logits, candidates)
        noise = gumbel(seeds[:, None, None], level, candidates.nodes)
        perturbed = condition_on_maximum(of_codes + kept.log_probs[..., None] + noise, kept.scores[..., None])
        scores, cells = best_cells(perturbed.flatten(1), min(k, space.num_nodes(level + 1)))
        return kept.longer(candidates, of_codes, cells, scores)


def condition_on_maximum(perturbed: Tensor, maximum: Tensor) -> Tensor:
    """Gumbel numbers moved so that their largest is the given one, each keeping its conditional distribution.

    Shapes: [..., M], [..., 1] -> [..., M]; -inf stays -inf, and a row of nothing else, or whose maximum is -inf, too.
    """
    is_number = (perturbed > NOTHING) & (maximum > NOTHING)
    value = perturbed.masked_fill(~is_number, 0.0).double()
    target = maximum.masked_fill(maximum == NOTHING, 0.0).double()
    largest = value.masked_fill(~is_number, NOTHING).amax(-1, keepdim=True)
    below = (value - largest).masked_fill(~is_number, -1.0)
    # log(1 - exp(below)), which is -inf for the largest itself.
    gap = (
        target
        - value
        + torch.where(below > -0.6931471805599453, (-below.expm1()).log(), (-below.exp()).log1p())
    )
    moved = target - gap.clamp(min=0) - (-gap.abs()).exp().log1p()
    return moved.float().masked_fill(~is_number, NOTHING)
