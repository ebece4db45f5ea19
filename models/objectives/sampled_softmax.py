"""Softmax over the target and a few thousand negatives shared by all positions of a step.

Source: the sampled softmax of Zhai et al., Actions Speak Louder than Words (2024), whose negatives are drawn per
position. Deviation: one set of negatives per step, drawn from (seed, step) alone, so that it is the same on
every rank and costs one matrix product.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.seeds import purpose_seed
from models.kernels.sampled_softmax import shared_negative_softmax
from models.objectives.retrieval import RetrievalObjective, Scoring
from models.recommender import LossSum, StepContext
from models.tables import Ids


class SampledSoftmax(RetrievalObjective):
    """L_t = -s_t+ + log(exp s_t+ + sum_j exp s_tj) over negatives j that are not the target of t.

    With `log_q`, the expected number of times an item is drawn, Q = negatives / items, is divided out:
    s_tj - log Q. That makes the sum over negatives an estimate of the sum over the whole catalogue.
    """

    features = ("target", "negative")

    @dataclass(frozen=True, kw_only=True)
    class Config(Scoring):
        num_negatives: int = 2048
        """Items drawn uniformly per step and shared by all its positions."""
        log_q: bool = False
        """Correct the scores of negatives for how often they are drawn."""

        def build(self, *, num_items: int) -> "SampledSoftmax":
            return SampledSoftmax(self, num_items)

    def __init__(self, config: Config, num_items: int):
        super().__init__(config, num_items)
        self.num_negatives = config.num_negatives
        self.correction = math.log(num_items / config.num_negatives) if config.log_q else 0.0

    def ids(self, targets: Tensor, context: StepContext) -> Ids:
        generator = torch.Generator().manual_seed(purpose_seed(context.seed, "negatives", context.step))
        negatives = torch.randint(self.num_items, (self.num_negatives,), generator=generator)
        return {"target": targets, "negative": negatives}

    def forward(
        self,
        queries: Tensor,
        targets: Tensor,
        vectors: Mapping[str, Tensor],
        ids: Mapping[str, Tensor],
        context: StepContext,
    ) -> LossSum:
        positive = (queries * vectors["target"]).sum(-1)
        is_target = targets[:, None] == ids["negative"]
        losses = shared_negative_softmax(queries, vectors["negative"], positive, is_target, self.correction)
        return LossSum(sum=losses.sum(), count=targets.shape[0])
