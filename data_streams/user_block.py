"""Users in serving order with their events gathered side by side: the NumPy form of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_streams.batch import Pages, SequenceBatch
from data_streams.jagged import Jagged
from data_streams.page_table import PageTable, concatenate

ITEM = "item"


@dataclass(frozen=True, kw_only=True)
class UserBlock:
    """Shapes: U users, T input events, S events of the known past.

    `inputs` and `targets` hold one [T] array per column; their entry `item` holds the item rows.
    """

    user_ids: np.ndarray
    """[U] int64."""
    offsets: np.ndarray
    """[U + 1] int64, where the inputs of each user begin."""
    inputs: Mapping[str, np.ndarray]
    targets: Mapping[str, np.ndarray] | None = None
    """The columns of the event that follows each input; None outside of training."""
    held_out: np.ndarray | None = None
    """[U] int64, the item to be ranked."""
    seen: np.ndarray | None = None
    """[S] int64, the items of the known past, uncut."""
    seen_offsets: np.ndarray | None = None
    """[U + 1] int64."""
    pages: PageTable | None = None
    """The pages to be predicted, of the same users."""

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    def select(self, start: int, stop: int) -> "UserBlock":
        """Users start..stop (exclusive); views, nothing is copied."""
        events = slice(self.offsets[start], self.offsets[stop])
        targets = seen = seen_offsets = None
        if self.targets is not None:
            targets = {name: column[events] for name, column in self.targets.items()}
        if self.seen is not None:
            seen = self.seen[self.seen_offsets[start] : self.seen_offsets[stop]]
            seen_offsets = self.seen_offsets[start : stop + 1] - self.seen_offsets[start]
        return UserBlock(
            user_ids=self.user_ids[start:stop],
            offsets=self.offsets[start : stop + 1] - self.offsets[start],
            inputs={name: column[events] for name, column in self.inputs.items()},
            targets=targets,
            held_out=None if self.held_out is None else self.held_out[start:stop],
            seen=seen,
            seen_offsets=seen_offsets,
            pages=None if self.pages is None else self.pages.take(np.arange(start, stop)),
        )


def collate(blocks: Sequence[UserBlock], position: Mapping[str, object] | None = None) -> SequenceBatch:
    """Put blocks of one kind behind each other and hand them to torch; at least one block is needed."""
    first = blocks[0]
    inputs = {name: _join([block.inputs[name] for block in blocks]) for name in first.inputs}
    targets = {name: _join([block.targets[name] for block in blocks]) for name in first.targets or {}}
    seen = None
    if first.seen is not None:
        seen = _jagged(_join([block.seen for block in blocks]), [block.seen_offsets for block in blocks])
    return SequenceBatch(
        user_ids=_join([block.user_ids for block in blocks]),
        items=_jagged(inputs.pop(ITEM), [block.offsets for block in blocks]),
        targets=targets.pop(ITEM, None),
        held_out=None if first.held_out is None else _join([block.held_out for block in blocks]),
        features=inputs,
        target_features=targets,
        seen=seen,
        pages=None if first.pages is None else _pages([block.pages for block in blocks]),
        position=position,
    )


def _pages(tables: Sequence[PageTable]) -> Pages:
    table = concatenate(tables)
    entries = {name: torch.from_numpy(column.astype(np.int64)) for name, column in table.entries.items()}
    sizes, counts = (torch.from_numpy(np.diff(part)) for part in (table.page_offsets, table.user_offsets))
    return Pages(
        items=Jagged.from_lengths(entries["item"], sizes),
        strengths=entries["strength"],
        positions=entries["position"],
        history_lengths=Jagged.from_lengths(torch.from_numpy(table.history_lengths), counts),
        times_s=torch.from_numpy(table.times_s),
    )


def _join(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays))


def _jagged(values: torch.Tensor, offsets: Sequence[np.ndarray]) -> Jagged:
    return Jagged.from_lengths(values, _join([np.diff(part) for part in offsets]))
