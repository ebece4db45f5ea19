"""Objectives of alignment: one pure file each, from log-probabilities and advantages to a loss.

What all have in common: a user's loss is the mean over the group, the batch's the sum over users, and the count the
number of users; the learner divides once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cluster.errors import ConfigError
from models.recommender import LossSum

RatioOf = Literal["item", "code"]
"""Whether probabilities of whole items are compared, or those of each code."""

LOG_RATIO_LIMIT = 10.0
"""Log-ratios are clamped to this, so that one stray completion cannot overflow."""


@dataclass(frozen=True, kw_only=True)
class PolicyInputs:
    """Shapes: B users, G completions, L codes, P observed positives (the longest user's)."""

    log_probs: Tensor
    """[B, G, L] fp32 of the policy that is trained, with gradient."""
    old_log_probs: Tensor
    """[B, G, L] fp32, stamped on the completions when they were drawn."""
    advantages: Tensor
    """[B, G], or [B, G, L] where every code has its own."""
    mask: Tensor
    """[B, G] bool: completions that count."""
    reference_log_probs: Tensor | None = None
    """[B, G, L] fp32 of the frozen reference; only where the objective `needs_reference`."""
    positive_log_probs: Tensor | None = None
    """[B, P, L] fp32 of the observed positives, with gradient; only where the objective `needs_positives`."""
    positive_mask: Tensor | None = None
    """[B, P] bool: which of them exist."""

    @property
    def num_users(self) -> int:
        return self.log_probs.shape[0]

    def token_advantages(self) -> Tensor:
        """Shapes: [B, G, L]."""
        advantages = self.advantages if self.advantages.dim() == 3 else self.advantages[..., None]
        return advantages.expand_as(self.log_probs)


class PolicyObjective(ABC):
    """The loss of completions; pure, without parameters and without state."""

    learns_from_older: bool
    """Whether completions may be older than the weights: it compares the policy with the one that drew, or does not
    care who drew."""
    needs_reference: bool = False
    """Whether it needs the log-probabilities of a frozen reference."""
    needs_positives: bool = False
    """Whether it needs the log-probabilities of the observed positives."""

    @abstractmethod
    def __call__(self, inputs: PolicyInputs) -> LossSum:
        """The loss summed over users, with `count` users; differentiable in the log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """Of objectives that clip ratios."""

    clip_low: float = 0.2
    """How far a ratio may fall below 1 before its gradient ends."""
    clip_high: float = 0.2
    """How far a ratio may rise above 1 before its gradient ends."""

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1 or self.clip_high <= 0:
            raise ConfigError(
                "objective.clip-low must lie in 0..1 and clip-high above 0, got "
                f"{self.clip_low} and {self.clip_high}"
            )


def counted(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities with 0 where a completion does not count, so that no -inf meets a gradient.

    Shapes: log_probs [B, G, L], mask [B, G] -> [B, G, L].
    """
    return log_probs.masked_fill(~mask[..., None], 0.0)


def log_ratio(new: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """ln(new / old), clamped; 0 where a completion does not count. Shapes: [B, G, L], mask [B, G]."""
    return (counted(new, mask) - counted(old, mask)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def sum_of_user_means(terms: Tensor, mask: Tensor) -> Tensor:
    """Sum over users of the mean over the group; what does not count is 0, and G stays the divisor.

    Shapes: terms, mask [B, G] -> scalar.
    """
    return terms.masked_fill(~mask, 0.0).mean(1).sum()


def sum_of_ratios(ratio: Tensor) -> Tensor:
    """The mean ratio of each user, summed, as metrics are; 1 where a completion does not count. Shapes: [B, G, n]."""
    return ratio.detach().mean((1, 2)).sum()


def per_ratio(inputs: PolicyInputs, ratio_of: RatioOf) -> tuple[Tensor, Tensor, Tensor]:
    """New and old log-probabilities and advantages of whole items, or of their codes.

    Shapes: three times [B, G, 1] or [B, G, L].
    """
    new, old = counted(inputs.log_probs, inputs.mask), counted(inputs.old_log_probs, inputs.mask)
    advantages = inputs.token_advantages()
    if ratio_of == "code":
        return new, old, advantages
    return new.sum(-1, keepdim=True), old.sum(-1, keepdim=True), advantages.mean(-1, keepdim=True)


def anchored(policy: Tensor, inputs: PolicyInputs, alpha: float, **metrics: Tensor) -> LossSum:
    """The policy's loss + alpha times the negative log-likelihood of the observed positives.

    The latter is, per user, the mean over its positives of -sum_t ln pi(v_t), and 0 without any. Shapes: policy and
    metrics are scalars, summed over users.
    """
    metrics["policy"] = policy.detach()
    if alpha == 0:
        return LossSum(sum=policy, count=inputs.num_users, metrics=metrics)
    mask = inputs.positive_mask
    of_items = -counted(inputs.positive_log_probs, mask).sum(-1)
    nll = (of_items.sum(1) / mask.sum(1).clamp(min=1)).sum()
    metrics["positive_nll"] = nll.detach()
    return LossSum(sum=policy + alpha * nll, count=inputs.num_users, metrics=metrics)


def clipped_terms(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """min(rho A, clip(rho, 1 - low, 1 + high) A), to be maximised. Shapes: two that broadcast."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def clipped_share(ratio: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """The share of each user's ratios beyond the limits, summed, as metrics are.

    Shapes: ratio [B, G, n], mask [B, G] -> scalar.
    """
    is_clipped = (ratio < 1 - low) | (ratio > 1 + high)
    return sum_of_user_means(is_clipped.float().mean(-1), mask)
