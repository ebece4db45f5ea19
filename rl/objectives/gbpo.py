"""GBPO: no sample is clipped away (but beyond e^-10 and e^10), and no gradient exceeds that of binary cross-entropy.

Source: OneRec-V2 (2025; industrial.md 4.3): the denominator is max(pi_old, sg(pi)) for advantages at or above 0 and
max(pi_old, 1 - sg(pi)) below. So a ratio is at most 1, or at most pi / (1 - pi). RECONSTRUCTED: per code, averaged over
the codes; the likelihood of positives stands for the supervised loss it is trained with, with alpha 0.1. The report's
samples are logged exposures; here they are completions that were drawn.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import ConfigError
from models.recommender import LossSum
from rl.objectives import (
    PolicyInputs,
    PolicyObjective,
    RatioOf,
    anchored,
    log_ratio,
    per_ratio,
    sum_of_ratios,
    sum_of_user_means,
)

_SMALLEST = 1e-12


class Gbpo(PolicyObjective):
    """L = -1/G sum_i pi / pi'_old A + alpha NLL of positives."""

    learns_from_older = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        ratio_of: RatioOf = "code"
        """Whether a ratio is that of the whole path, as printed, or one for each code."""
        alpha: float = 0.1
        """Weight of the likelihood of observed positives."""

        def __post_init__(self) -> None:
            if self.alpha < 0:
                raise ConfigError(f"objective.alpha must be at least 0, got {self.alpha}")

        def build(self) -> "Gbpo":
            return Gbpo(self)

    def __init__(self, config: Config):
        self.config = config
        self.needs_positives = config.alpha > 0

    def __call__(self, inputs: PolicyInputs) -> LossSum:
        new, old, advantages = per_ratio(inputs, self.config.ratio_of)
        ratio = log_ratio(new, bounded_old(new.detach(), old, advantages), inputs.mask).exp()
        return anchored(
            -sum_of_user_means((ratio * advantages).mean(-1), inputs.mask),
            inputs,
            self.config.alpha,
            ratio=sum_of_ratios(ratio),
        )


def bounded_old(new: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """ln pi'_old. Shapes: three times [B, G, L]."""
    complement = torch.log(-torch.expm1(new).clamp(max=-_SMALLEST))
    return torch.where(advantages >= 0, torch.maximum(old, new), torch.maximum(old, complement))
