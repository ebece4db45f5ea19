"""The context of a user as tokens side by side: who it is, what it did, what it liked.

A token is known from some position of a target on, and where a pathway keeps only so many events, up to another one;
so one context per user serves targets after each of its events. Sources: OneRec Technical Report (arXiv 2506.13695)
and OneRec-V2 (arXiv 2508.20900).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_streams.jagged import Jagged
from models.kernels.context_attention import NEVER
from models.layers.linear import Linear


@dataclass(frozen=True, kw_only=True)
class ContextTokens:
    """Shapes: C tokens."""

    vectors: Tensor
    """[C, D]."""
    places: Jagged
    """[C] int64, a row per user: place of the event in the user's history, 0 for the user itself."""
    since: Tensor
    """[C] int64: the first position of a target that may know it; the target behind n events is at position n."""
    until: Tensor
    """[C] int64: the first position at which it is forgotten."""

    def last_ones(self, lengths: Tensor) -> "ContextTokens":
        """What is known behind all events of each user; reads sizes on the host. Shapes: lengths [B]."""
        row = self.places.row_index()
        kept = torch.nonzero((self.since <= lengths[row]) & (lengths[row] < self.until))[:, 0]
        counts = torch.zeros_like(lengths).index_add_(0, row[kept], torch.ones_like(kept))
        places = Jagged.from_lengths(self.places.values[kept], counts.cpu()).to(lengths.device)
        return ContextTokens(
            vectors=self.vectors[kept], places=places, since=self.since[kept], until=self.until[kept]
        )


@dataclass(frozen=True, kw_only=True)
class TokenOrder:
    """Tokens user by user: the user itself, where it is one, then each pathway's events. Shapes: C tokens."""

    order: Tensor
    """[C] int64: of the parts one behind the other, which stands where."""
    places: Jagged
    """[C] int64, a row per user."""
    kinds: Tensor
    """[C] int64: number of the part."""

    @staticmethod
    def build(items: Jagged, *, with_user: bool, num_pathways: int) -> "TokenOrder":
        places, row, own = items.places(), items.row_index(), int(with_user)
        users = torch.arange(items.num_rows + 1, device=places.device)
        firsts = own * users + num_pathways * items.offsets
        begins, lengths = firsts[row] + own + places, items.lengths[row]
        # There may be no part at all, and nothing cannot be joined.
        nothing = places[:0]
        spots = [firsts[:-1]] * own + [begins + number * lengths for number in range(num_pathways)]
        order = torch.cat([nothing, *spots])
        if len(spots) > 1:
            order = order.argsort()
        parts = [torch.zeros_like(users[1:])] * own + [places] * num_pathways
        kinds = [torch.full_like(part, number) for number, part in enumerate(parts)]
        jagged = Jagged(
            values=torch.cat([nothing, *parts])[order],
            offsets=firsts,
            max_length=own + num_pathways * items.max_length,
        )
        return TokenOrder(order=order, places=jagged, kinds=torch.cat([nothing, *kinds])[order])

    def arrange(self, parts: Sequence[Tensor]) -> Tensor:
        """Shapes: [B, ...] of the users, where they are tokens, and [T, ...] of each pathway -> [C, ...]."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))[self.order]


class Pathway(nn.Module):
    """Dense(LeakyReLU(Dense(features)))."""

    def __init__(self, features: int, hidden: int, width: int):
        super().__init__()
        self.expand, self.project = Linear(features, hidden), Linear(hidden, width)

    def forward(self, features: Tensor) -> Tensor:
        """Shapes: [n, features] -> [n, width]."""
        return self.project(F.leaky_relu(self.expand(features)))


def latest(items: Jagged, length: int | None) -> tuple[Tensor, Tensor]:
    """Since and until of the latest `length` events, or of all. Shapes: 2 x [T]."""
    since = items.places() + 1
    return since, torch.full_like(since, NEVER) if length is None else since + length


def positive_feedback(items: Jagged, is_positive: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Since and until of the latest `length` events that were answered well; other events are never known.

    Shapes: is_positive [T] bool -> 2 x [T].
    """
    places, row = items.places(), items.row_index()
    number = is_positive.long().cumsum(0) - 1
    # A positive event is forgotten where the one `length` further is known.
    spots = places.shape[0] + length
    since_of = torch.full((spots + 1,), NEVER, device=places.device)
    row_of = torch.full((spots + 1,), -1, device=places.device)
    at = torch.where(is_positive, number, spots)
    since_of, row_of = since_of.scatter(0, at, places + 1), row_of.scatter(0, at, row)
    next_one = (number + length).clamp(min=0)
    until = torch.where(row_of[next_one] == row, since_of[next_one], NEVER)
    return torch.where(is_positive, places + 1, NEVER), until
