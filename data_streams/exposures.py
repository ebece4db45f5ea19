"""What users were shown between two moments of a split, and how they answered it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cluster.errors import DataError
from data_streams.batch import SequenceBatch
from data_streams.canonical import ChunkReader, Deal
from data_streams.configuration import DataConfig
from data_streams.jagged import Jagged
from data_streams.schema import EXPOSURE
from data_streams.shards import Chunk
from data_streams.stream import open_data
from data_streams.target_pages import EventReading

NO_ITEM = -1


@dataclass(frozen=True, kw_only=True)
class ExposureBatch:
    """Shapes: B users, C exposures (of the user who was shown most), A actions."""

    histories: SequenceBatch
    """What each user took before, by the first of the actions; without event columns."""
    candidates: Tensor
    """[B, C] int64 item rows, -1 in empty places."""
    answers: Tensor
    """[B, C, A] bool."""


class ExposureStream:
    """The pages between a user's last training click and the held-out one, which is on the last of them.

    Since the pages end with a click, each of them alone has too many clicks; over many users the share of clicks
    is right (Wald). Users without a history, a held-out click or exposures are left out.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        split: Literal["valid", "test"],
        actions: Sequence[str],
        rank: int,
        world_size: int,
    ):
        """Raises: DataError where the data holds no exposures or none of an action."""
        storage, self.manifest = open_data(config)
        missing = [name for name in (EXPOSURE, *actions) if name not in self.manifest.actions]
        missing += [name for name in ("action", "page_id") if name not in self.manifest.columns]
        if missing:
            raise DataError(
                f"a model of answers is evaluated on exposures, and {config.path} lacks {', '.join(missing)}; build "
                "it with --keep-exposures from a source with pages"
            )
        self._config = replace(
            config, columns=("action", "page_id"), history_exposures=True, feedback_lag_s=0.0, pages="none"
        )
        self._split, self._codes = split, [self.manifest.actions.index(name) for name in actions]
        self._exposure = self.manifest.actions.index(EXPOSURE)
        self._reader = ChunkReader(
            storage, self.manifest, self._config, EventReading(self.manifest, self._config, "serve")
        )
        num_users = np.array([record.num_users for record in self.manifest.chunks], dtype=np.int64)
        self._pieces = Deal(np.arange(len(num_users)), num_users, num_users, world_size).pieces(rank)

    def batches(self) -> Iterator[ExposureBatch]:
        """One batch for each part of a chunk; ranks can have different numbers of them."""
        for piece in self._pieces:
            read = self._reader.read(piece)
            if read is not None and (batch := self._batch(read[0])):
                yield batch

    def empty_batch(self) -> ExposureBatch:
        """A batch without users, for a rank that has read all of its own."""
        nothing = torch.zeros(0, dtype=torch.int64)
        return ExposureBatch(
            histories=SequenceBatch(user_ids=nothing, items=Jagged.from_lengths(nothing, nothing)),
            candidates=nothing.view(0, 1),
            answers=torch.zeros(0, 1, len(self._codes), dtype=torch.bool),
        )

    def _batch(self, chunk: Chunk) -> ExposureBatch | None:
        user = np.repeat(np.arange(chunk.num_users), chunk.lengths)
        action, page = chunk.columns["action"], chunk.columns["page_id"]
        within = np.arange(chunk.num_events) - chunk.offsets[user]
        taken = action == self._codes[0]
        start, stop = self._window(chunk, user, page, within, taken)
        is_shown = (action == self._exposure) & (within > start[user]) & (within < stop[user])
        is_past = taken & (within <= start[user])
        kept = _has(is_shown, user, chunk.num_users) & _has(is_past, user, chunk.num_users)
        if not kept.any():
            return None
        new_row = np.cumsum(kept) - 1
        is_shown, is_past = is_shown & kept[user], is_past & kept[user]
        same = (user * (int(page.max()) + 1) + page) * self.manifest.num_items + chunk.items
        answers = np.stack([np.isin(same[is_shown], same[action == code]) for code in self._codes], axis=-1)
        rows, columns = new_row[user[is_shown]], _place(user[is_shown])
        candidates = np.full((kept.sum(), columns.max() + 1), NO_ITEM, dtype=np.int64)
        candidates[rows, columns] = chunk.items[is_shown]
        padded = np.zeros((*candidates.shape, len(self._codes)), dtype=bool)
        padded[rows, columns] = answers
        return ExposureBatch(
            histories=self._histories(chunk, user, is_past, kept),
            candidates=torch.from_numpy(candidates),
            answers=torch.from_numpy(padded),
        )

    def _window(
        self, chunk: Chunk, user: np.ndarray, page: np.ndarray, within: np.ndarray, taken: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Last click before the page of the held-out one, and the end of that page, by place within the user.

        Shapes: twice [U]; an empty window where nothing is held out.
        """
        held_out = {"valid": chunk.valid_at, "test": chunk.test_at}[self._split].astype(np.int64)
        there = held_out >= 0
        target = page[chunk.offsets[:-1] + np.maximum(held_out, 0)]
        on_page = page == target[user]
        start, stop = np.full(chunk.num_users, -1), np.zeros(chunk.num_users, dtype=np.int64)
        before = taken & ~on_page & (within < held_out[user])
        np.maximum.at(start, user[before], within[before])
        np.maximum.at(stop, user[on_page], within[on_page] + 1)
        return start, np.where(there, stop, 0)

    def _histories(
        self, chunk: Chunk, user: np.ndarray, is_past: np.ndarray, kept: np.ndarray
    ) -> SequenceBatch:
        counts = np.bincount(user[is_past], minlength=chunk.num_users)[kept]
        # Only the latest events of each user, as everywhere.
        from_end = np.repeat(np.cumsum(counts), counts) - np.arange(counts.sum())
        recent = from_end <= self._config.max_length
        lengths = np.minimum(counts, self._config.max_length)
        items = chunk.items[is_past][recent].astype(np.int64)
        return SequenceBatch(
            user_ids=torch.from_numpy(chunk.users[kept].astype(np.int64)),
            items=Jagged.from_lengths(torch.from_numpy(items), torch.from_numpy(lengths)),
        )


def _has(mask: np.ndarray, user: np.ndarray, num_users: int) -> np.ndarray:
    """Whether each user has an event that is marked. Shapes: [T], [T] -> [U] bool."""
    return np.bincount(user[mask], minlength=num_users) > 0


def _place(user: np.ndarray) -> np.ndarray:
    """Number of each event among those of the same user. Example: 3 3 3 7 7 -> 0 1 2 0 1."""
    first = np.flatnonzero(np.diff(user, prepend=-1))
    return np.arange(len(user)) - np.repeat(first, np.diff(np.append(first, len(user))))
