"""What travels from the stream to the model: the users of one rank and step, without padding."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from data_streams.jagged import Jagged, moved

EXPOSED, CLICKED, ORDERED = 0, 1, 2
"""How an item of a page was answered, weakest first."""


@dataclass(frozen=True, kw_only=True)
class Pages:
    """The pages to be predicted for the users of a batch, each with its items, the strongest answers first.

    Shapes: B users, P pages, E items of all pages.

    Example: one user with history (5, 7, 8) and two pages: after 5 the page of 7 (clicked) and 2 (only shown), after 5
    and 7 the page of 8 (ordered). Then items has the rows (7, 2) and (8), strengths are (1, 0, 2) and history_lengths
    has the one row (1, 2).
    """

    items: Jagged
    """[E] int64 item rows, a row per page: ordered, then clicked, then only exposed ones; ties as they were shown."""
    strengths: Tensor
    """[E] int64, ORDERED, CLICKED or EXPOSED."""
    positions: Tensor
    """[E] int64, place on the page, -1 where it is not known."""
    history_lengths: Jagged
    """[P] int64, a row per user: how many of the user's `SequenceBatch.items` come before the page; at least 1."""
    times_s: Tensor
    """[P] int64, when the page begins; -1 without times."""

    @property
    def num_pages(self) -> int:
        return self.items.num_rows

    def history_ends(self, sequences: Jagged) -> Tensor:
        """Index into `sequences.values` just behind the last event each page may know. Shapes: [P] int64."""
        return sequences.offsets[self.history_lengths.row_index()] + self.history_lengths.values

    def to(self, device: torch.device) -> "Pages":
        return Pages(
            items=self.items.to(device),
            strengths=moved(self.strengths, device),
            positions=moved(self.positions, device),
            history_lengths=self.history_lengths.to(device),
            times_s=moved(self.times_s, device),
        )

    def select(self, start: int, stop: int) -> "Pages":
        """The pages of users start..stop (exclusive); host side only."""
        low, high = (int(self.history_lengths.offsets[user]) for user in (start, stop))
        first, last = int(self.items.offsets[low]), int(self.items.offsets[high])
        return Pages(
            items=_select_rows(self.items, low, high),
            strengths=self.strengths[first:last],
            positions=self.positions[first:last],
            history_lengths=_select_rows(self.history_lengths, start, stop),
            times_s=self.times_s[low:high],
        )


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
    """[T] or [T, n] each: event columns of `items` (timestamp_s, action, page_id, position, play_time_s, ...)."""
    target_features: Mapping[str, Tensor] = field(default_factory=dict)
    """[T] each: the same columns of `targets`."""
    seen: Jagged | None = None
    """[S] int64, every item of the user's known past, also what lies beyond the maximum length."""
    pages: Pages | None = None
    """Where pages are asked for: in training those of the users' spans, in evaluation the one of `held_out`."""
    supervision: Mapping[str, Jagged] = field(default_factory=dict)
    """Further rows per user that the model's `training_batch` has made, of what to learn where."""
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    """Further tensors that it has made for all users together; every part of the batch has them whole."""
    position: Mapping[str, object] | None = None
    """Where the stream stands once this batch has been trained on (plain JSON values)."""

    @property
    def num_users(self) -> int:
        return self.user_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.items.values.shape[0]

    def to(self, device: torch.device) -> "SequenceBatch":
        move = lambda tensor: None if tensor is None else moved(tensor, device)  # noqa: E731
        return replace(
            self,
            user_ids=move(self.user_ids),
            items=self.items.to(device),
            targets=move(self.targets),
            held_out=move(self.held_out),
            features={name: move(value) for name, value in self.features.items()},
            target_features={name: move(value) for name, value in self.target_features.items()},
            seen=None if self.seen is None else self.seen.to(device),
            pages=None if self.pages is None else self.pages.to(device),
            supervision={name: rows.to(device) for name, rows in self.supervision.items()},
            shared={name: move(value) for name, value in self.shared.items()},
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
            pages=None if self.pages is None else self.pages.select(start, stop),
            supervision={name: _select_rows(rows, start, stop) for name, rows in self.supervision.items()},
        )


def _select_rows(jagged: Jagged, start: int, stop: int) -> Jagged:
    first, last = int(jagged.offsets[start]), int(jagged.offsets[stop])
    return Jagged.from_lengths(jagged.values[first:last], jagged.lengths[start:stop])


def page_key(user: np.ndarray, page: np.ndarray) -> np.ndarray:
    """A number for each page of each user, and one for what lies on no page (-1). Shapes: [T], [T] -> [T] int64."""
    return user.astype(np.int64) * (int(page.max(initial=0)) + 2) + page + 1


def page_item_key(user: np.ndarray, page: np.ndarray, item: np.ndarray) -> np.ndarray:
    """A number for each item of each page of each user. Shapes: three times [T] -> [T] int64."""
    return page_key(user, page) * (int(item.max(initial=0)) + 1) + item
