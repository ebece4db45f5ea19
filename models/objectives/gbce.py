"""Generalised binary cross-entropy, which takes back the overconfidence that comes from sampling negatives.

Source: Petrov and Macdonald, gSASRec: Reducing Overconfidence in Sequential Recommendation Trained with Negative
Sampling (2023). Deviations: the step's positions share their negatives; items are scored by the rows that embed them,
where gSASRec has a second table for that; sigm(s+)^beta is never formed, since -log(sigm(s+)^beta) is beta
softplus(-s+), which needs no float64. RECONSTRUCTED: scores begin at ln(beta / k), where the target weighs as much as
all negatives. At 0 the first gradients are those of negatives alone, a thousand times those of targets, and row-wise
Adagrad, which remembers them for good, then hardly moves a row any more.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from cluster.errors import ConfigError
from models.kernels.pairwise_losses import binary_cross_entropy
from models.kernels.shared_negatives import Formula
from models.objectives.negatives import DotProductSampling, PairwiseObjective


class GeneralisedBinaryCrossEntropy(PairwiseObjective):
    """L_t = -1/(k+1) [beta log sigm(s_t+) + sum_j log(1 - sigm(s_tj))] over k negatives.

    With a = k / (items - 1), the share of the catalogue that is drawn: beta = a (t (1 - 1/a) + 1/a).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(DotProductSampling):
        num_negatives: int = 256
        """Items drawn per step and shared by all its positions."""
        calibration: float = 0.75
        """t of the paper: from scores of 0, 0 is plain binary cross-entropy and 1 gives calibrated probabilities;
        `balanced` moves the scores by a constant, which changes no ranking."""
        balanced: bool = True
        """Let scores begin at ln(beta / k); the paper lets them begin at 0."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.calibration <= 1:
                raise ConfigError(f"objective.calibration must lie in 0..1, got {self.calibration}")

        def beta(self, num_items: int) -> float:
            share = min(self.num_negatives / max(num_items - 1, 1), 1.0)
            return share * (self.calibration * (1 - 1 / share) + 1 / share)

        def build(
            self, *, num_items: int, item_counts: np.ndarray | None = None
        ) -> "GeneralisedBinaryCrossEntropy":
            return GeneralisedBinaryCrossEntropy(self, num_items, item_counts)

    def __init__(self, config: Config, num_items: int, item_counts: np.ndarray | None):
        super().__init__(config, num_items, item_counts)
        self.negative_weight = 1 / (config.num_negatives + 1)
        beta = config.beta(num_items)
        self.positive_weight = beta * self.negative_weight
        self.begin = math.log(beta / config.num_negatives) if config.balanced else 0.0

    def formula(self) -> Formula:
        of_scores = partial(binary_cross_entropy, self.positive_weight, self.negative_weight)
        return lambda scores, positive, excluded: of_scores(
            scores.add_(self.begin), positive + self.begin, excluded
        )
