"""Softmax over the target and a few thousand negatives shared by all positions of a step.

Source: the sampled softmax of Zhai et al., Actions Speak Louder than Words (2024), whose negatives are drawn
uniformly and per position. Deviations: one set of negatives per step, of which a share may be drawn by popularity; the
temperature is 0.07 where none is given, published 0.05.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.kernels.best_query_softmax import best_query_softmax
from models.kernels.sampled_softmax import shared_negative_softmax
from models.objectives.negatives import NegativeSampling, SharedNegativeObjective


class SampledSoftmax(SharedNegativeObjective):
    """L_t = -s_t+ + log(exp s_t+ + sum_j exp s_tj) over negatives j that are not the target of t.

    With `log_q`, log Q_j is taken from s_tj, where Q_j is the number of times item j is expected among the
    negatives. That makes the sum over negatives an unbiased estimate of the sum over the whole catalogue.

    With queries [T, M, D], a score is the largest product of an item with a position's M queries.
    """

    takes_several_queries = True

    @dataclass(frozen=True, kw_only=True)
    class Config(NegativeSampling):
        log_q: bool = False
        """Correct the scores of negatives for how often they are drawn."""

        def build(self, *, num_items: int, item_counts: np.ndarray | None = None) -> "SampledSoftmax":
            return SampledSoftmax(self, num_items, item_counts)

    def __init__(self, config: Config, num_items: int, item_counts: np.ndarray | None):
        super().__init__(config, num_items, item_counts)
        self.log_q = config.log_q

    def loss(
        self, queries: Tensor, negatives: Tensor, positive: Tensor, targets: Tensor, negative_ids: Tensor
    ) -> Tensor:
        softmax = shared_negative_softmax if queries.dim() == 2 else best_query_softmax
        return softmax(queries, negatives, positive, targets, negative_ids, self._weights(negative_ids))

    def _weights(self, negative_ids: Tensor) -> Tensor:
        """What the exponential of each negative's score is multiplied with. Shapes: [R] -> [R] fp32."""
        if self.log_q:
            return 1 / self.sampler.expected_counts(negative_ids)
        return torch.ones(negative_ids.shape, device=negative_ids.device)
