"""What users were shown between two moments of a split, and how they answered it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cluster.errors import DataError
from cluster.user_draws import drawn_users
from data_streams.batch import SequenceBatch, page_item_key
from data_streams.canonical import ChunkReader, Deal
from data_streams.configuration import DataConfig
from data_streams.held_out_windows import between, held_out_window
from data_streams.jagged import Jagged
from data_streams.pass_progress import told
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
    """The pages between a user's last answer and the held-out event, which is on the last of them.

    Training leaves them out, and validation those that the test has too, unless both hold out one event. Each window
    ends with what was held out, so more of it is answered than of all pages. Users without a history, a held-out event
    on a page or exposures are left out.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        split: Literal["valid", "test"],
        actions: Sequence[str],
        rank: int,
        world_size: int,
        users_per_batch: int,
        user_share: float = 1.0,
    ):
        """`users_per_batch` counts the users of all ranks; a share below 1 draws users as `EvaluationStream` does.

        Raises: DataError where the data holds no exposures or none of an action.
        """
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
        self._batch_users, self._user_share = max(users_per_batch // world_size, 1), user_share

    def batches(self) -> Iterator[ExposureBatch]:
        """At most so many users of a chunk each; ranks can have different numbers of them."""
        for piece in told(self._pieces):
            read = self._reader.read(piece)
            chunk_users = 0 if read is None else read[0].num_users
            for start in range(0, chunk_users, self._batch_users):
                stop = min(start + self._batch_users, chunk_users)
                if batch := self._batch(read[0].select(start, stop)):
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
        user, action, page = chunk.user_index, chunk.columns["action"], chunk.columns["page_id"]
        taken, is_exposure = action == self._codes[0], action == self._exposure
        start, stop = self._window(chunk, is_exposure)
        is_shown = is_exposure & (page >= 0) & between(chunk, start, stop)
        is_past = taken & (chunk.places <= start[user])
        kept = _has(is_shown, user, chunk.num_users) & _has(is_past, user, chunk.num_users)
        if self._user_share < 1:
            kept &= drawn_users(chunk.users, self._user_share)
        if not kept.any():
            return None
        new_row = np.cumsum(kept) - 1
        is_shown, is_past = is_shown & kept[user], is_past & kept[user]
        same = page_item_key(user, page, chunk.items)
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

    def _window(self, chunk: Chunk, is_exposure: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `held_out_window`; for validation without what the test evaluates. Shapes: [T] -> twice [U]."""
        start, stop = held_out_window(chunk, self._split, is_exposure)
        if self._split == "test":
            return start, stop
        test_start, test_stop = held_out_window(chunk, "test", is_exposure)
        # Of one event, both are the same on purpose (leave-one-out).
        cuts = (test_stop > 0) & (chunk.test_at != chunk.valid_at)
        return start, np.where(cuts, np.minimum(stop, test_start + 1), stop)

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
