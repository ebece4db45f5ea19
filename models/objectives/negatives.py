"""Negatives that all positions of a step share: how they are drawn, and what objectives over them have in common.

They are drawn from (seed, step) alone, so that they are the same on every rank and cost one lookup of a few thousand
rows and one matrix product, where negatives of their own for every position would cost a row each.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cluster.errors import ConfigError
from cluster.seeds import purpose_seed
from models.kernels.shared_negatives import Formula, shared_negative_loss
from models.objectives.retrieval import RetrievalObjective, Scoring
from models.recommender import LossSum, StepContext
from models.tables import Ids


@dataclass(frozen=True, kw_only=True)
class NegativeSampling(Scoring):
    """How a step's negatives are drawn, with replacement."""

    num_negatives: int = 2048
    """Items drawn per step and shared by all its positions."""
    popularity_share: float = 0.0
    """Fraction of the negatives drawn in proportion to count^power; the others are uniform over all items."""
    popularity_power: float = 0.75
    """Power of an item's number of training events: 1 is popularity, 0 uniform over items that have any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_negatives < 1:
            raise ConfigError(f"objective.num-negatives must be at least 1, got {self.num_negatives}")
        if not 0 <= self.popularity_share <= 1:
            raise ConfigError(f"objective.popularity-share must lie in 0..1, got {self.popularity_share}")

    @property
    def needs_item_counts(self) -> bool:
        return self.num_popular > 0

    @property
    def num_popular(self) -> int:
        """Negatives drawn by popularity."""
        return round(self.num_negatives * self.popularity_share)


@dataclass(frozen=True, kw_only=True)
class DotProductSampling(NegativeSampling):
    """The same for objectives whose papers score by plain dot products."""

    normalised: bool = False
    """Scale queries and item vectors to length one, so that the score is a cosine."""
    temperature: float = 1.0
    """Scores are divided by it."""


class NegativeSampler(nn.Module):
    """Draws the negatives of a step, and knows how often each item is expected among them.

    Cost: 12 bytes per item where popularity counts; a draw is a binary search.
    """

    def __init__(self, config: NegativeSampling, num_items: int, item_counts: np.ndarray | None):
        super().__init__()
        self.num_items = num_items
        self.num_popular = config.num_popular
        self.num_uniform = config.num_negatives - config.num_popular
        if self.num_popular:
            probabilities = item_probabilities(item_counts, config.popularity_power)
            self.cumulative = np.cumsum(probabilities)
            self.cumulative /= self.cumulative[-1]
            self.register_buffer(
                "probabilities", torch.from_numpy(probabilities.astype(np.float32)), persistent=False
            )

    def draw(self, seed: int, step: int) -> Tensor:
        """Item rows [R] on the host: first the uniform ones, then those drawn by popularity."""
        generator = torch.Generator().manual_seed(purpose_seed(seed, "negatives", step))
        uniform = torch.randint(self.num_items, (self.num_uniform,), generator=generator)
        if not self.num_popular:
            return uniform
        places = torch.rand(self.num_popular, dtype=torch.float64, generator=generator)
        popular = np.searchsorted(self.cumulative, places.numpy(), side="right")
        return torch.cat((uniform, torch.from_numpy(popular)))

    def expected_counts(self, items: Tensor) -> Tensor:
        """How often each of these items is drawn per step, on average. Shapes: [n] -> [n] fp32."""
        uniform = torch.full(items.shape, self.num_uniform / self.num_items, device=items.device)
        return uniform + self.num_popular * self.probabilities[items] if self.num_popular else uniform


class SharedNegativeObjective(RetrievalObjective):
    """An objective over each position's target and the negatives of the step; without targets among them."""

    features = ("target", "negative")

    def __init__(self, config: NegativeSampling, num_items: int, item_counts: np.ndarray | None):
        super().__init__(config, num_items)
        self.sampler = NegativeSampler(config, num_items, item_counts)

    def ids(self, targets: Tensor, context: StepContext) -> Ids:
        return {"target": targets, "negative": self.sampler.draw(context.seed, context.step)}

    @abstractmethod
    def loss(
        self, queries: Tensor, negatives: Tensor, positive: Tensor, targets: Tensor, negative_ids: Tensor
    ) -> Tensor:
        """The summed loss. Shapes: as `models.kernels.shared_negatives`."""

    def forward(
        self,
        queries: Tensor,
        targets: Tensor,
        vectors: Mapping[str, Tensor],
        ids: Mapping[str, Tensor],
        context: StepContext,
    ) -> LossSum:
        positive = target_scores(queries, vectors["target"])
        loss = self.loss(queries, vectors["negative"], positive, targets, ids["negative"])
        return LossSum(sum=loss, count=targets.shape[0])


def target_scores(queries: Tensor, vectors: Tensor) -> Tensor:
    """Of each position, by its best query where it has several. Shapes: [T, D] or [T, M, D], vectors [T, D] -> [T]."""
    if queries.dim() == 2:
        return (queries * vectors).sum(-1)
    return (queries * vectors[:, None]).sum(-1).max(1).values


class PairwiseObjective(SharedNegativeObjective):
    """A loss that compares the target's score with each negative's, given as a formula with its derivatives."""

    @abstractmethod
    def formula(self) -> Formula: ...

    def loss(
        self, queries: Tensor, negatives: Tensor, positive: Tensor, targets: Tensor, negative_ids: Tensor
    ) -> Tensor:
        return shared_negative_loss(queries, negatives, positive, targets, negative_ids, self.formula())


def draw_different(number: int, wanted: int, generator: torch.Generator) -> Tensor:
    """So many different integers below a number, or all there are; every choice is equally likely. Shapes: [N].

    Cost: does not grow with the number.
    """
    if number < 2 * wanted:
        return torch.randperm(number, generator=generator)[:wanted]
    drawn = torch.zeros(0, dtype=torch.int64)
    while len(drawn) < wanted:
        # One round is enough as good as always: of twice as many draws more than half differ.
        more = torch.randint(number, (2 * wanted,), generator=generator)
        drawn = torch.cat((drawn, more)).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:wanted]]


def item_probabilities(item_counts: np.ndarray | None, power: float) -> np.ndarray:
    """count^power, scaled to add up to 1; 0 for items without events. Shapes: [N] -> [N] float64.

    Raises: ConfigError if there are no counts, or none above zero.
    """
    if item_counts is None or not np.any(item_counts):
        raise ConfigError(
            "an objective that weighs items by popularity needs training events to count, and there are none; "
            "set objective.popularity-share to 0 and objective.log-q to False, or build the data again"
        )
    weights = np.where(item_counts > 0, np.asarray(item_counts, dtype=np.float64) ** power, 0.0)
    return weights / weights.sum()
