"""BPR-max: the target's score above those of negatives that count by their scores.

Source: Hidasi and Karatzoglou, Recurrent Neural Networks with Top-k Gains (2018).
Deviation: the step's positions share their negatives.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from models.kernels.pairwise_losses import bpr_max
from models.kernels.shared_negatives import Formula
from models.objectives.negatives import DotProductSampling, PairwiseObjective


class BprMax(PairwiseObjective):
    """L_t = -log sum_j p_tj sigm(s_t+ - s_tj) + r sum_j p_tj s_tj^2, with p_t = softmax of the negatives' scores."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DotProductSampling):
        regularisation: float = 1.0
        """Weight r of the squared scores of the negatives, `bpreg` of the published code."""

        def build(self, *, num_items: int, item_counts: np.ndarray | None = None) -> "BprMax":
            return BprMax(self, num_items, item_counts)

    def __init__(self, config: Config, num_items: int, item_counts: np.ndarray | None):
        super().__init__(config, num_items, item_counts)
        self.regularisation = config.regularisation

    def formula(self) -> Formula:
        return partial(bpr_max, self.regularisation)
