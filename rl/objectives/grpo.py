"""GRPO: clipped policy ratios, each completion averaged over its codes, with a KL term to a frozen reference.

Source: Shao et al., DeepSeekMath (2024), in the notation of classic.md 9.1; the KL estimate is k3 = q - ln q - 1 with
q = pi_ref / pi. MiniOneRec uses a KL weight of 1e-3.
"""

from dataclasses import dataclass

import torch

from cluster.errors import ConfigError
from models.recommender import LossSum
from rl.objectives import (
    ClipOptions,
    PolicyInputs,
    PolicyObjective,
    clipped_share,
    clipped_terms,
    log_ratio,
    sum_of_ratios,
    sum_of_user_means,
)


class Grpo(PolicyObjective):
    """L = -1/G sum_i 1/L sum_t [min(rho A, clip(rho, 1 - low, 1 + high) A) - beta k3]."""

    learns_from_older = True

    @dataclass(frozen=True, kw_only=True)
    class Config(ClipOptions):
        kl_weight: float = 1e-3
        """Weight of the KL to the reference; 0 needs no reference."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.kl_weight < 0:
                raise ConfigError(f"objective.kl-weight must be at least 0, got {self.kl_weight}")

        def build(self) -> "Grpo":
            return Grpo(self)

    def __init__(self, config: Config):
        self.config = config
        self.needs_reference = config.kl_weight > 0

    def __call__(self, inputs: PolicyInputs) -> LossSum:
        config = self.config
        ratio = log_ratio(inputs.log_probs, inputs.old_log_probs, inputs.mask).exp()
        terms = clipped_terms(ratio, inputs.token_advantages(), config.clip_low, config.clip_high)
        metrics = {
            "ratio": sum_of_ratios(ratio),
            "clipped_share": clipped_share(ratio, inputs.mask, config.clip_low, config.clip_high),
        }
        if self.needs_reference:
            log_q = log_ratio(inputs.reference_log_probs, inputs.log_probs, inputs.mask)
            kl = torch.expm1(log_q) - log_q
            terms = terms - config.kl_weight * kl
            metrics["kl"] = sum_of_user_means(kl.detach().mean(-1), inputs.mask)
        loss = -sum_of_user_means(terms.mean(-1), inputs.mask)
        return LossSum(sum=loss, count=inputs.num_users, metrics=metrics)
