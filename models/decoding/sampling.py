"""Sampling with replacement: independent draws from the model's distribution over allowed items."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import ConfigError
from models.decoding.distribution import NOTHING, CodeDistribution
from models.decoding.random_numbers import uniform
from models.decoding.search import Decoded, PathSearch, Step, next_logits
from models.decoding.space import PathSpace
from models.generator import DecodeState, Generator

ITEM_DRAW = 1 << 20
"""Stands for a level no path has: which item of a shared path is taken."""


class Sampling(PathSearch):
    """k draws per user in the order drawn, so an item may come several times.

    The log-probability of a draw is that of its path after mask, temperature and truncation: what it was really
    drawn from. Which of several items with one path comes is chosen evenly and is not part of it. Slots are empty for
    users who may have nothing.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        temperature: float = 1.0
        """Divides the scores of every level; above 1 for more variety."""
        top_k: int | None = None
        """Only the k most likely codes of a prefix can be drawn; None keeps all."""
        top_p: float = 1.0
        """Only the most likely codes that hold this much probability together can be drawn."""

        def build(self) -> "Sampling":
            return Sampling(self)

    def __init__(self, config: Config):
        self._distribution = CodeDistribution(
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
        )

    def distribution(self) -> CodeDistribution:
        return self._distribution

    def search_from(
        self, model: Generator, state: DecodeState, space: PathSpace, *, k: int, seeds: Tensor | None = None
    ) -> Decoded:
        check_seeds(seeds, state.num_users)
        numbers = torch.arange(k, device=state.device)
        drawn = None
        for level in range(len(space.code_sizes)):
            logits, state = next_logits(model, state, level, drawn, space)
            numbers_of_level = uniform(seeds[:, None], level, numbers)
            drawn = self._extend(drawn or Step.root(state), level, logits, space, numbers_of_level)
        items = space.draw_items(drawn.nodes, uniform(seeds[:, None], ITEM_DRAW, numbers))
        paths = space.codes(len(space.code_sizes), drawn.nodes)
        # Where no code may follow, the first one was taken with a probability of zero.
        is_empty = drawn.log_probs == NOTHING
        return Decoded(
            items=items.masked_fill(is_empty, -1),
            log_probs=drawn.log_probs,
            scores=drawn.scores,
            paths=paths.masked_fill(is_empty[..., None], -1),
            code_log_probs=drawn.code_log_probs.masked_fill(is_empty[..., None], NOTHING),
        )

    def _extend(self, drawn: Step, level: int, logits: Tensor, space: PathSpace, numbers: Tensor) -> Step:
        """One code for each number [B, k] in (0, 1); the first ones all continue the empty prefix."""
        candidates = space.candidates(level, drawn.nodes)
        log_probs = self._distribution.log_probabilities(logits, candidates)
        size = log_probs.shape[-1]
        cumulative = log_probs.double().exp().cumsum(-1).expand(*numbers.shape, size).contiguous()
        goal = numbers[..., None] * cumulative[..., -1:]
        # The first cell whose sum exceeds the goal has a probability above zero; rounding can only exceed the last.
        last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous())
        cells = torch.minimum(torch.searchsorted(cumulative, goal, right=True), last)[..., 0]
        parents = torch.arange(numbers.shape[1], device=numbers.device) if level else 0
        return drawn.longer(candidates, log_probs, parents * size + cells)


def check_seeds(seeds: Tensor | None, num_users: int) -> None:
    """Raises: ConfigError where users have no seed each."""
    if seeds is None or seeds.shape != (num_users,) or seeds.dtype != torch.int64:
        given = "none" if seeds is None else f"{seeds.dtype} {list(seeds.shape)}"
        raise ConfigError(f"drawing needs one int64 seed for each of the {num_users} users, and got {given}")
