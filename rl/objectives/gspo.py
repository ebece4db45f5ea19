"""GSPO: one clipped ratio for a whole completion, the geometric mean of those of its codes.

Source: Zheng et al., Group Sequence Policy Optimization (2025), in the notation of classic.md 9.4, whose limits are the
defaults. Like every ratio it matters only where completions are older than the weights (`--align.max-staleness 1`).
"""

from dataclasses import dataclass

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


class Gspo(PolicyObjective):
    """L = -1/G sum_i min(s A, clip(s, 1 - low, 1 + high) A), s = exp(1/L sum_t ln rho_t)."""

    learns_from_older = True

    @dataclass(frozen=True, kw_only=True)
    class Config(ClipOptions):
        clip_low: float = 3e-4
        """How far a ratio may fall below 1 before its gradient ends."""
        clip_high: float = 4e-4
        """How far a ratio may rise above 1 before its gradient ends."""

        def build(self) -> "Gspo":
            return Gspo(self)

    def __init__(self, config: Config):
        self.config = config

    def __call__(self, inputs: PolicyInputs) -> LossSum:
        low, high = self.config.clip_low, self.config.clip_high
        of_codes = log_ratio(inputs.log_probs, inputs.old_log_probs, inputs.mask)
        ratio = of_codes.mean(-1, keepdim=True).exp()
        terms = clipped_terms(ratio, inputs.token_advantages().mean(-1, keepdim=True), low, high)
        return LossSum(
            sum=-sum_of_user_means(terms.squeeze(-1), inputs.mask),
            count=inputs.num_users,
            metrics={
                "ratio": sum_of_ratios(ratio),
                "clipped_share": clipped_share(ratio, inputs.mask, low, high),
            },
        )
