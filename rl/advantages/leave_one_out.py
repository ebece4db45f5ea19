"""Rewards against the mean of the others of the group: an unbiased baseline (RLOO).

Source: Kool et al., Buy 4 REINFORCE Samples, Get a Baseline for Free! (2019); Ahmadian et al., Back to Basics (2024).
"""

from dataclasses import dataclass

import numpy as np

from rl.advantages import SMALLEST_STD, AdvantageEstimator, finished, masked_moments
from rl.types import Advantages


class LeaveOneOut(AdvantageEstimator):
    """A_i = r_i - mean_{j != i} r_j = n / (n - 1) (r_i - mean)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        def build(self) -> "LeaveOneOut":
            return LeaveOneOut()

    def estimate(self, values: np.ndarray, mask: np.ndarray) -> Advantages:
        mean, std = masked_moments(values, mask)
        count = mask.sum(1, keepdims=True)
        return finished((values - mean) * count / np.maximum(count - 1, 1), mask, std[:, 0] < SMALLEST_STD)
