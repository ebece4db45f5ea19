"""What travels from the stream to the model: the users of one rank and step, without padding."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from data_streams.jagged import Jagged


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """A set of users, each with a time-ordered history of item rows.

    Shapes: B users, T history events in all.

    In training `items` holds all but the last event of each user's span and `targets` the event that follows
    each of them, so every position is supervised. In evaluation `items` is the known history and `held_out` the
    one item to be ranked. When serving both are None.
    """

    user_ids: Tensor
    """[B] int64, row of each user in the user vocabulary of the shards."""
    items: Jagged
    """[T] int64 item rows, oldest first, at most the configured maximum length per user."""
    targets: Tensor | None = None
    """[T] int64, the item that follows each position of the same user."""
    held_out: Tensor | None = None
    """[B] int64, the item to be ranked."""
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """[T] each: event columns of `items` (timestamp_s, action, page_id, position, play_time_s, ...)."""
    target_features: Mapping[str, Tensor] = field(default_factory=dict)
    """[T] each: the same columns of `targets`."""
    seen: Jagged | None = None
    """[S] int64, every item of the user's known past, also what lies beyond the maximum length."""
    position: Mapping[str, object] | None = None
    """Where the stream stands once this batch has been trained on (plain JSON values)."""

    @property
    def num_users(self) -> int:
        return self.user_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.items.values.shape[0]

    def to(self, device: torch.device) -> "SequenceBatch":
        move = lambda tensor: None if tensor is None else tensor.to(device, non_blocking=True)  # noqa: E731
        return replace(
            self,
            user_ids=move(self.user_ids),
            items=self.items.to(device),
            targets=move(self.targets),
            held_out=move(self.held_out),
            features={name: move(value) for name, value in self.features.items()},
            target_features={name: move(value) for name, value in self.target_features.items()},
            seen=None if self.seen is None else self.seen.to(device),
        )

    def select(self, start: int, stop: int) -> "SequenceBatch":
        """Users start..stop (exclusive) as a batch of their own; host side only (reads offsets)."""
        first, last = int(self.items.offsets[start]), int(self.items.offsets[stop])
        cut = lambda tensor, low, high: None if tensor is None else tensor[low:high]  # noqa: E731
        return replace(
            self,
            user_ids=self.user_ids[start:stop],
            items=_select_rows(self.items, start, stop),
            targets=cut(self.targets, first, last),
            held_out=cut(self.held_out, start, stop),
            features={name: value[first:last] for name, value in self.features.items()},
            target_features={name: value[first:last] for name, value in self.target_features.items()},
            seen=None if self.seen is None else _select_rows(self.seen, start, stop),
        )


def _select_rows(jagged: Jagged, start: int, stop: int) -> Jagged:
    first, last = int(jagged.offsets[start]), int(jagged.offsets[stop])
    return Jagged.from_lengths(jagged.values[first:last], jagged.lengths[start:stop])
