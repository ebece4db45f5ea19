"""Binary cross-entropy: the target against 1, each negative against 0.

Source: Kang and McAuley, Self-Attentive Sequential Recommendation (2018). Deviation: the step's positions share their
negatives, which may be items of the user and whose weights add up to the one negative per position of the paper; the
loss is a mean over target and negatives, half of the paper's sum.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from cluster.errors import ConfigError
from models.kernels.pairwise_losses import binary_cross_entropy
from models.kernels.shared_negatives import Formula
from models.objectives.negatives import DotProductSampling, PairwiseObjective


class BinaryCrossEntropy(PairwiseObjective):
    """L_t = -1/(k+1) [log sigm(s_t+) + (k/R) sum_j log(1 - sigm(s_tj))] over R negatives that weigh as much as k."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DotProductSampling):
        num_negatives: int = 256
        """Items drawn per step and shared by all its positions."""
        negatives_per_target: float | None = 1.0
        """What all negatives together weigh against the target, 1 being SASRec's; None gives each the weight 1."""

        def __post_init__(self) -> None:
            super().__post_init__()
            weight = self.negatives_per_target
            if weight is not None and not weight > 0:
                raise ConfigError(f"objective.negatives-per-target must be above 0, or None, got {weight}")

        def build(self, *, num_items: int, item_counts: np.ndarray | None = None) -> "BinaryCrossEntropy":
            return BinaryCrossEntropy(self, num_items, item_counts)

    def __init__(self, config: Config, num_items: int, item_counts: np.ndarray | None):
        super().__init__(config, num_items, item_counts)
        weight = config.negatives_per_target
        weight = config.num_negatives if weight is None else weight
        self.positive_weight = 1 / (weight + 1)
        self.negative_weight = weight / config.num_negatives / (weight + 1)

    def formula(self) -> Formula:
        return partial(binary_cross_entropy, self.positive_weight, self.negative_weight)
