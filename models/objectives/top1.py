"""TOP1: the target's score above that of each negative, whose scores are held near zero.

Source: Hidasi et al., Session-based Recommendations with Recurrent Neural Networks (2016).
Deviation: the step's positions share their negatives.
"""

from dataclasses import dataclass

import numpy as np

from models.kernels.pairwise_losses import top1
from models.kernels.shared_negatives import Formula
from models.objectives.negatives import DotProductSampling, PairwiseObjective


class Top1(PairwiseObjective):
    """L_t = 1/R sum_j [sigm(s_tj - s_t+) + sigm(s_tj^2)] over R negatives."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DotProductSampling):
        def build(self, *, num_items: int, item_counts: np.ndarray | None = None) -> "Top1":
            return Top1(self, num_items, item_counts)

    def formula(self) -> Formula:
        return top1
