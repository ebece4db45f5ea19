"""Attention of candidates to the latest behaviours of a user, which are then averaged within windows of time.

Source: Zhu et al., Learning Tree-based Deep Model for Recommender Systems (2018), figure of the attention DNN; a weight
is an MLP of (behaviour, behaviour * candidate, candidate). MEMORY: the weights are not normalised, and a window's
average is over the behaviours that are there. The first layer is computed as a map of the behaviour that depends on the
candidate, W1 + W2 diag(candidate), so that behaviour * candidate is never laid out for all pairs.

Shapes: S histories, C candidates of each, L behaviours, W windows, D width, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LatestEvents:
    """The latest events of each history, the latest first, as indices into those of a batch.

    Padded to the longest: the products over pairs are dense, and a window of the past is seldom short of events.
    """

    events: Tensor
    """[S, L] int64; some valid index where there is none."""
    is_there: Tensor
    """[S, L] bool."""

    @staticmethod
    def build(last: Tensor, first: Tensor, length: int) -> "LatestEvents":
        """Shapes: index of the last and the first event of each history [S]."""
        events = last[:, None] - torch.arange(length, device=last.device)
        is_there = events >= first[:, None]
        return LatestEvents(events=events.clamp(min=0), is_there=is_there)


class WindowAttention(nn.Module):
    """`windows` are the lengths of the windows, the latest first."""

    def __init__(self, width: int, hidden: int, windows: Sequence[int]):
        super().__init__()
        self.windows = tuple(windows)
        scale = (3 * width) ** -0.5
        # Parameters and not layers, since they are multiplied in another order than a layer would.
        self.of_behaviour, self.of_product, self.of_candidate = (
            nn.Parameter(torch.empty(hidden, width).uniform_(-scale, scale)) for _ in range(3)
        )
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.slope = nn.Parameter(torch.full((hidden,), 0.25))
        self.output = nn.Parameter(torch.empty(hidden).uniform_(-(hidden**-0.5), hidden**-0.5))
        self.output_bias = nn.Parameter(torch.zeros(1))

    @property
    def num_events(self) -> int:
        return sum(self.windows)

    def forward(self, candidates: Tensor, behaviours: Tensor, is_there: Tensor) -> Tensor:
        """Shapes: candidates [S, C, D], behaviours [S, L, D], is_there [S, L] bool -> [S, C, W * D]."""
        weights = self.weights(candidates, behaviours) * is_there[:, None]
        pooled, start = [], 0
        for length in self.windows:
            here = slice(start, start + length)
            count = is_there[:, here].sum(1).clamp(min=1)[:, None, None]
            pooled.append(weights[..., here] @ behaviours[:, here] / count)
            start += length
        return torch.cat(pooled, dim=-1)

    def weights(self, candidates: Tensor, behaviours: Tensor) -> Tensor:
        """How much each candidate looks at each behaviour. Shapes: -> [S, C, L]."""
        num_candidates, hidden = candidates.shape[1], len(self.bias)
        maps = candidates[:, :, None] * self.of_product + self.of_behaviour
        constant = F.linear(candidates, self.of_candidate, self.bias).flatten(1)[:, None]
        inner = torch.baddbmm(constant, behaviours, maps.flatten(1, 2).mT).view(-1, hidden)
        # output * PReLU(x) = (output - below) * relu(x) + below * x, of which PReLU itself takes three times as long.
        below = self.output * self.slope
        weights = inner.relu() @ (self.output - below).to(inner.dtype) + inner @ below.to(inner.dtype)
        return weights.view(*behaviours.shape[:2], num_candidates).mT + self.output_bias
