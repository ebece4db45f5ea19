"""Beam search: the most likely items, exact when the beam is as wide as the catalogue."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from cluster.errors import ConfigError
from models.decoding.distribution import NOTHING, CodeDistribution
from models.decoding.ranking import best_cells
from models.decoding.search import Decoded, PathSearch, Step, check_width, next_logits
from models.decoding.space import PathSpace
from models.generator import DecodeState, Generator

PrefixScorer = Callable[[int, Tensor], Tensor]
"""(depth, prefixes [B, C, depth]) -> scores [B, C]: a process reward model that is asked about prefixes."""


class BeamSearch(PathSearch):
    """Keeps the best prefixes of every depth; equal scores go to the smaller path.

    With a guide, the best candidates by log-probability are scored by it, and its scores alone choose the beam and
    order the result. Source: PROMISE (arXiv 2601.04674), section on inference.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        width: int = 50
        """Prefixes kept per user and depth."""
        earlier_widths: tuple[int, ...] = ()
        """The same for the depths before the last, where they keep other numbers; all that follow keep the width."""
        over: Literal["all", "allowed"] = "all"
        """What a level's probabilities sum to one over. `all` codes ranks items by the model's own probability;
        over the `allowed` ones, an item gains from every sibling that does not exist or is forbidden."""
        temperature: float = 1.0
        """Divides the model's scores of every level."""
        guided_candidates: int | tuple[int, ...] | None = None
        """Prefixes per user that a guide scores, at every depth or one number for each; None takes four times the
        width. Where it is the width, the guide changes nothing but the order."""

        def build(self) -> "BeamSearch":
            return BeamSearch(self)

    def __init__(self, config: Config, guide: PrefixScorer | None = None):
        self.config, self.guide = config, guide
        self._widths = (*config.earlier_widths, config.width)
        self._candidates = self._candidates_by_depth()
        for level in range(max(len(self._widths), len(self._candidates))):
            width, fewest = _of_level(self._widths, level), _of_level(self._candidates, level)
            if width < 1:
                raise ConfigError(f"a beam must be at least 1 wide, and it is {width}")
            if fewest < width:
                raise ConfigError(
                    f"a guide must score at least as many candidates as the beam is wide, and {fewest} are fewer "
                    f"than {width}; raise the candidates or narrow the beam"
                )

    def _candidates_by_depth(self) -> tuple[int, ...]:
        if self.guide is None:
            return self._widths
        given = self.config.guided_candidates
        if given is None:
            return tuple(4 * width for width in self._widths)
        return given if isinstance(given, tuple) else (given,)

    def distribution(self) -> CodeDistribution:
        return CodeDistribution(temperature=self.config.temperature, over=self.config.over)

    def check(self, model: Generator, space: PathSpace, k: int, num_users: int) -> None:
        super().check(model, space, k, num_users)
        check_width("the width of the beam", self.config.width, space)
        if k > self.config.width:
            raise ConfigError(
                f"a beam of {self.config.width} cannot return {k} items; ask for fewer or widen it"
            )

    def search_from(
        self, model: Generator, state: DecodeState, space: PathSpace, *, k: int, seeds: Tensor | None = None
    ) -> Decoded:
        beam, kept = None, []
        for level in range(len(space.code_sizes)):
            logits, state = next_logits(model, state, level, beam, space)
            beam = self._extend(beam or Step.root(state), level, logits, space)
            kept.append(beam.nodes.masked_fill(beam.log_probs == NOTHING, -1))
            if level + 1 < len(space.code_sizes):
                beam = beam.in_node_order()
        return replace(beam.decoded(space, k), kept=tuple(kept))

    def _extend(self, beam: Step, level: int, logits: Tensor, space: PathSpace) -> Step:
        """The best prefixes that are one code longer, best first."""
        candidates = space.candidates(level, beam.nodes)
        of_codes = self.distribution().log_probabilities(logits, candidates)
        totals = (of_codes + beam.log_probs[..., None]).flatten(1)
        num_kept = min(_of_level(self._candidates, level), space.num_nodes(level + 1), totals.shape[1])
        longer = beam.longer(candidates, of_codes, best_cells(totals, num_kept)[1])
        return longer if self.guide is None else self._guided(longer, level, space)

    def _guided(self, candidates: Step, level: int, space: PathSpace) -> Step:
        depth = level + 1
        scores = self.guide(depth, space.codes(depth, candidates.nodes)).float()
        scores = scores.masked_fill(candidates.log_probs == NOTHING, NOTHING)
        scores, cells = best_cells(scores, min(_of_level(self._widths, level), scores.shape[1]))
        return replace(candidates.take(cells), scores=scores)


def _of_level(numbers: tuple[int, ...], level: int) -> int:
    """The last number holds for all further levels."""
    return numbers[min(level, len(numbers) - 1)]
