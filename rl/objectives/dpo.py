"""DPO: the best completion of a group is to gain on the worst one, measured against the policy alignment started from.

Source: Rafailov et al., Direct Preference Optimization (2023); the iterative preference alignment of OneRec (2025;
industrial.md 4.1) pairs the completions that a reward model finds best and worst, L = L_NTP + lambda L_DPO, and then
takes the new policy as the reference: `grail align` on the aligned run. Against all others of the group it is
softmax-DPO (Chen et al., On Softmax Direct Preference Optimization for Recommendation, 2024). RECONSTRUCTED: beta 0.1
and lambda 1; pairs are completions of single items, where OneRec's are of sessions; every prompt is paired, where
OneRec pairs one in a hundred.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import ConfigError
from models.recommender import LossSum
from rl.objectives import PolicyInputs, PolicyObjective, anchored, log_ratio


class Dpo(PolicyObjective):
    """L = -ln sigm(-ln sum_l exp(beta (D_l - D_w))) + alpha NLL of positives, D = ln pi / pi_ref of a whole path.

    w has the largest advantage of its group, l the smallest, or all smaller ones. Groups without a difference have
    no pair.
    """

    learns_from_older = True
    needs_reference = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        beta: float = 0.1
        """How hard a difference to the reference counts."""
        rejected: Literal["worst", "all"] = "worst"
        """What the best completion is compared with: the worst one, or all that are worse than it."""
        alpha: float = 1.0
        """Weight of the likelihood of observed positives."""

        def __post_init__(self) -> None:
            if self.beta <= 0 or self.alpha < 0:
                raise ConfigError(
                    f"objective.beta must be above 0 and alpha at or above 0, got {self.beta} and {self.alpha}"
                )

        def build(self) -> "Dpo":
            return Dpo(self)

    def __init__(self, config: Config):
        self.config = config
        self.needs_positives = config.alpha > 0

    def __call__(self, inputs: PolicyInputs) -> LossSum:
        best, rejected = self._pairs(inputs)
        gains = log_ratio(inputs.log_probs, inputs.reference_log_probs, inputs.mask).sum(-1)
        of_best, has_pair = gains.gather(1, best), rejected.any(1)
        behind = (self.config.beta * (gains - of_best)).masked_fill(~rejected, float("-inf"))
        margin = -behind.masked_fill(~has_pair[:, None], 0.0).logsumexp(1)
        return anchored(
            F.softplus(-margin).masked_fill(~has_pair, 0.0).sum(),
            inputs,
            self.config.alpha,
            paired_share=has_pair.float().sum(),
            margin=margin.detach().masked_fill(~has_pair, 0.0).sum(),
            gain_of_best=of_best.detach()[:, 0].masked_fill(~has_pair, 0.0).sum(),
        )

    def _pairs(self, inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
        """The best completion of each group, and which are worse or, of these, the worst. Shapes: [B, 1], [B, G]."""
        advantages = inputs.token_advantages().mean(-1)
        best = advantages.masked_fill(~inputs.mask, float("-inf")).argmax(1, keepdim=True)
        is_worse = inputs.mask & (advantages < advantages.gather(1, best))
        if self.config.rejected == "all":
            return best, is_worse
        worst = advantages.masked_fill(~is_worse, float("inf")).argmin(1, keepdim=True)
        return best, is_worse & (torch.arange(is_worse.shape[1], device=worst.device) == worst)
