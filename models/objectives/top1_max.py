"""TOP1-max: TOP1 in which negatives count by their scores, so that the easy ones do not drown the hard.

Source: Hidasi and Karatzoglou, Recurrent Neural Networks with Top-k Gains (2018).
Deviation: the step's positions share their negatives.
"""

from dataclasses import dataclass

import numpy as np

from models.kernels.pairwise_losses import top1_max
from models.kernels.shared_negatives import Formula
from models.objectives.negatives import DotProductSampling, PairwiseObjective


class Top1Max(PairwiseObjective):
    """L_t = sum_j p_tj [sigm(s_tj - s_t+) + sigm(s_tj^2)], with p_t = softmax of the negatives' scores."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DotProductSampling):
        def build(self, *, num_items: int, item_counts: np.ndarray | None = None) -> "Top1Max":
            return Top1Max(self, num_items, item_counts)

    def formula(self) -> Formula:
        return top1_max
