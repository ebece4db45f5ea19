"""ECPO: GRPO whose denominators are raised beforehand, so that no negative advantage meets a large ratio.

Source: OneRec Technical Report (2025; industrial.md 4.2): pi'_old = max(sg(pi) / (1 + eps + delta), pi_old). Then the
ratio never exceeds 1 + eps + delta, nor does its gradient. RECONSTRUCTED: eps = 0.2, alpha = 0.1. No KL: the reports
train it together with the supervised loss, which is `alpha` here.
"""

import math
from dataclasses import dataclass

import torch

from cluster.errors import ConfigError
from models.recommender import LossSum
from rl.objectives import (
    PolicyInputs,
    PolicyObjective,
    RatioOf,
    anchored,
    clipped_terms,
    log_ratio,
    per_ratio,
    sum_of_ratios,
    sum_of_user_means,
)


class Ecpo(PolicyObjective):
    """L = -1/G sum_i min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = pi / pi'_old, + alpha NLL of positives."""

    learns_from_older = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        clip: float = 0.2
        """eps: how far a ratio may be from 1 before its gradient ends."""
        early_clip: float = 0.1
        """delta: how far beyond that a ratio with a negative advantage may go."""
        ratio_of: RatioOf = "item"
        """Whether a ratio is that of the whole path, as printed, or one for each code."""
        alpha: float = 0.1
        """Weight of the likelihood of observed positives."""

        def __post_init__(self) -> None:
            if not 0 < self.clip < 1 or self.early_clip < 0 or self.alpha < 0:
                raise ConfigError(
                    "objective.clip must lie in 0..1, early-clip and alpha at or above 0, got "
                    f"{self.clip}, {self.early_clip} and {self.alpha}"
                )

        def build(self) -> "Ecpo":
            return Ecpo(self)

    def __init__(self, config: Config):
        self.config = config
        self.needs_positives = config.alpha > 0
        self.largest_ratio = 1 + config.clip + config.early_clip

    def __call__(self, inputs: PolicyInputs) -> LossSum:
        new, old, advantages = per_ratio(inputs, self.config.ratio_of)
        early = torch.maximum(new.detach() - math.log(self.largest_ratio), old)
        ratio = log_ratio(new, early, inputs.mask).exp()
        terms = clipped_terms(ratio, advantages, self.config.clip, self.config.clip)
        return anchored(
            -sum_of_user_means(terms.mean(-1), inputs.mask),
            inputs,
            self.config.alpha,
            ratio=sum_of_ratios(ratio),
            early_clipped_share=sum_of_user_means((early > old).float().mean(-1), inputs.mask),
        )
