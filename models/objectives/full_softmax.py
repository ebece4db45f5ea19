"""Softmax over the whole catalogue, each rank scoring the rows it owns."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.objectives.retrieval import RetrievalObjective, Scoring
from models.recommender import LossSum, StepContext
from models.tables import Ids


class FullSoftmax(RetrievalObjective):
    """L_t = -log softmax(s_t)[target of t] over all items.

    Cost: each rank multiplies T / world_size queries with num_items vectors, or all T queries of a step with
    num_items / world_size vectors, whichever moves less between ranks.
    """

    features = ("vocabulary",)

    @dataclass(frozen=True, kw_only=True)
    class Config(Scoring):
        def build(self, *, num_items: int) -> "FullSoftmax":
            return FullSoftmax(self, num_items)

    def ids(self, targets: Tensor, context: StepContext) -> Ids:
        return {"vocabulary": torch.arange(*context.own_range(self.num_items))}

    def forward(
        self,
        queries: Tensor,
        targets: Tensor,
        vectors: Mapping[str, Tensor],
        ids: Mapping[str, Tensor],
        context: StepContext,
    ) -> LossSum:
        loss = context.cross_entropy(queries, vectors["vocabulary"], targets, self.num_items)
        return LossSum(sum=loss, count=targets.shape[0])
