"""Dr. GRPO: clipped ratios divided by one constant length; meant for advantages that are not divided by a spread.

Source: Liu et al., Understanding R1-Zero-Like Training (2025), in the notation of classic.md 9.3. All items have the
same number of codes, so what differs from GRPO is the advantage (choose `--advantage group
--advantage.no-divide-by-std`), and that the constant may be chosen.
"""

from dataclasses import dataclass

from cluster.errors import ConfigError
from models.recommender import LossSum
from rl.objectives import (
    ClipOptions,
    PolicyInputs,
    PolicyObjective,
    clipped_terms,
    log_ratio,
    sum_of_ratios,
    sum_of_user_means,
)


class DrGrpo(PolicyObjective):
    """L = -1/(G Lmax) sum_i sum_t min(rho A, clip(rho, 1 - low, 1 + high) A)."""

    learns_from_older = True

    @dataclass(frozen=True, kw_only=True)
    class Config(ClipOptions):
        max_length: int | None = None
        """The constant a completion's sum is divided by; None takes the number of codes."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.max_length is not None and self.max_length < 1:
                raise ConfigError(f"objective.max-length must be at least 1, got {self.max_length}")

        def build(self) -> "DrGrpo":
            return DrGrpo(self)

    def __init__(self, config: Config):
        self.config = config

    def __call__(self, inputs: PolicyInputs) -> LossSum:
        config = self.config
        ratio = log_ratio(inputs.log_probs, inputs.old_log_probs, inputs.mask).exp()
        terms = clipped_terms(ratio, inputs.token_advantages(), config.clip_low, config.clip_high)
        length = config.max_length or ratio.shape[-1]
        loss = -sum_of_user_means(terms.sum(-1) / length, inputs.mask)
        metrics = {"ratio": sum_of_ratios(ratio)}
        return LossSum(sum=loss, count=inputs.num_users, metrics=metrics)
