"""Bayesian personalised ranking: the target's score above that of each negative.

Source: Rendle et al., BPR: Bayesian Personalized Ranking from Implicit Feedback (2009).
Deviation: the step's positions share their negatives.
"""

from dataclasses import dataclass

import numpy as np

from models.kernels.pairwise_losses import bpr
from models.kernels.shared_negatives import Formula
from models.objectives.negatives import DotProductSampling, PairwiseObjective


class BayesianPersonalisedRanking(PairwiseObjective):
    """L_t = -1/R sum_j log sigm(s_t+ - s_tj) over R negatives."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DotProductSampling):
        def build(
            self, *, num_items: int, item_counts: np.ndarray | None = None
        ) -> "BayesianPersonalisedRanking":
            return BayesianPersonalisedRanking(self, num_items, item_counts)

    def formula(self) -> Formula:
        return bpr
