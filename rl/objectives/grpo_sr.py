"""GRPO-SR: strictly on-policy gradients, anchored by the likelihood of what users really took.

Source: GenRec (JD.com, 2026; industrial.md 1.4). The ratio pi / sg(pi) is 1 in value, so only its gradient counts: no
clipping, no KL, no reference. RECONSTRUCTED: alpha = 0.1, which the paper does not say.
"""

from dataclasses import dataclass

from cluster.errors import ConfigError
from models.recommender import LossSum
from rl.objectives import PolicyInputs, PolicyObjective, anchored, counted, sum_of_user_means


class GrpoSr(PolicyObjective):
    """L = -1/G sum_i 1/L sum_t pi / sg(pi) A - alpha E_{v in D+} sum_t ln pi(v_t)."""

    learns_from_older = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        alpha: float = 0.1
        """Weight of the likelihood of observed positives."""

        def __post_init__(self) -> None:
            if self.alpha < 0:
                raise ConfigError(f"objective.alpha must be at least 0, got {self.alpha}")

        def build(self) -> "GrpoSr":
            return GrpoSr(self)

    def __init__(self, config: Config):
        self.config = config
        self.needs_positives = config.alpha > 0

    def __call__(self, inputs: PolicyInputs) -> LossSum:
        new = counted(inputs.log_probs, inputs.mask)
        ratio = (new - new.detach()).exp()
        policy = -sum_of_user_means((ratio * inputs.token_advantages()).mean(-1), inputs.mask)
        return anchored(policy, inputs, self.config.alpha)
