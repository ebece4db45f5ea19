"""From a model's scores of a level to the log-probabilities of how a prefix goes on."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cluster.errors import ConfigError
from models.decoding.space import Candidates, PathSpace

NOTHING = float("-inf")


@dataclass(frozen=True, kw_only=True)
class CodeDistribution:
    """Temperature, mask and truncation of each level; searches and teacher forcing share it, so they agree."""

    temperature: float = 1.0
    top_k: int | None = None
    """Only the k most likely candidates of a prefix stay; None keeps all."""
    top_p: float = 1.0
    """Only the most likely candidates stay that hold this much probability together."""
    over: Literal["allowed", "all"] = "allowed"
    """What probabilities sum to one over: the allowed candidates (mask before the softmax), or all codes of the
    level, so that a path keeps the model's own probability (mask after it)."""

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or (self.top_k is not None and self.top_k < 1):
            raise ConfigError(
                "decoding needs a temperature above 0, top_p in (0, 1] and top_k of at least 1, and got "
                f"{self.temperature}, {self.top_p} and {self.top_k}"
            )
        if self.over == "all" and (self.top_k is not None or self.top_p < 1):
            raise ConfigError(
                "top_k and top_p cut a distribution over allowed codes; they need over = allowed"
            )

    def log_probabilities(self, logits: Tensor, candidates: Candidates) -> Tensor:
        """Of each candidate after its prefix; -inf where it is not allowed or was cut off.

        Shapes: logits [B, W, K] -> [B, W, M] fp32.
        """
        scaled = logits.float() / self.temperature
        chosen = scaled if candidates.codes is None else scaled.gather(-1, candidates.codes)
        if self.over == "all":
            result = chosen - scaled.logsumexp(-1, keepdim=True)
            return result if candidates.allowed is None else result.masked_fill(~candidates.allowed, NOTHING)
        result = _log_softmax(chosen, candidates.allowed)
        if self.top_k is None and self.top_p == 1:
            return result
        return _log_softmax(result, self._keep(result))

    def _keep(self, log_probabilities: Tensor) -> Tensor:
        """Which candidates stay after truncation; the most likely one always does. Shapes: [..., M] -> bool."""
        ordered, order = log_probabilities.detach().sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.exp()
        # Beyond the last allowed candidate nothing may stay, whatever rounding does to the sum.
        keep = (probabilities.cumsum(-1) - probabilities < self.top_p) & (ordered > NOTHING)
        if self.top_k is not None:
            keep[..., self.top_k :] = False
        return torch.zeros_like(keep).scatter(-1, order, keep)


def _log_softmax(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Over the allowed cells of the last dimension, -inf elsewhere; where none is allowed, gradients are zero."""
    if allowed is None:
        return logits.log_softmax(-1)
    is_dead = ~allowed.any(-1, keepdim=True)
    masked = logits.masked_fill(~allowed & ~is_dead, NOTHING).masked_fill(is_dead, 0.0)
    return masked.log_softmax(-1).masked_fill(~allowed, NOTHING)


def path_log_probabilities(
    logits: list[Tensor], paths: Tensor, space: PathSpace, distribution: CodeDistribution
) -> Tensor:
    """Log-probability of each code of given paths in a space; -inf from where a path leaves it. Differentiable.

    Shapes: L times [B, N, K_l], paths [B, N, L] (-1 for none) -> [B, N, L] fp32.
    """
    nodes, result = torch.zeros_like(paths[..., 0]), []
    is_inside = torch.ones_like(nodes, dtype=torch.bool)
    for level, level_logits in enumerate(logits):
        found = space.find(paths[..., : level + 1])
        is_inside, children = is_inside & (found >= 0), found.clamp(min=0)
        candidates = space.candidates(level, nodes)
        of_candidates = distribution.log_probabilities(level_logits, candidates)
        numbers = space.child_number(level, nodes, children)
        taken = of_candidates.gather(-1, numbers[..., None])[..., 0]
        result.append(taken.masked_fill(~is_inside, NOTHING))
        nodes = children
    return torch.stack(result, dim=-1)
