"""The stream an evaluation reads: this rank's share of the users of a split, batch by batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from cluster.user_draws import drawn_users
from data_streams.batch import SequenceBatch
from data_streams.canonical import ChunkReader, Deal, event_columns
from data_streams.configuration import DataConfig
from data_streams.jagged import gather_ranges, offsets_of
from data_streams.page_table import PageTable
from data_streams.pass_progress import told
from data_streams.shards import Chunk
from data_streams.stream import open_data
from data_streams.target_pages import EventReading
from data_streams.user_block import ITEM, UserBlock, collate

ACTION = "action"
NO_ACTION = -1


class EvaluationStream:
    """The users of a split in fixed order, each exactly once over all ranks.

    valid and test: the history before the held-out event, for users that have one (the validation event is
    part of the test history). serve: the whole history of every user. Users without any history are left out.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        split: Literal["valid", "test", "serve"],
        rank: int,
        world_size: int,
        users_per_batch: int,
        user_share: float = 1.0,
        held_out_action: str = "",
        rows: Sequence[int] | None = None,
    ):
        """`users_per_batch` counts the users of all ranks; a share below 1 draws users of valid and test, always the
        same ones; a named action leaves only those whose held-out event has it, and `rows` only the users of these.
        Raises: as TrainStream."""
        if held_out_action:
            config = replace(config, columns=tuple(dict.fromkeys((*config.columns, ACTION))))
        storage, self.manifest = open_data(config)
        self._action = self.manifest.action_code(held_out_action) if held_out_action else None
        self._config, self._split = config, split
        self._user_share, self._rows = 1.0 if split == "serve" else user_share, rows
        self._batch_users = max(users_per_batch // world_size, 1)
        self._reading = EventReading(self.manifest, config, split)
        self._reader = ChunkReader(storage, self.manifest, config, self._reading)
        num_users = np.array([record.num_users for record in self.manifest.chunks], dtype=np.int64)
        deal = Deal(np.arange(len(num_users)), num_users, num_users, world_size)
        self._pieces = deal.pieces(rank)
        self._without_history = 0

    @property
    def counters(self) -> dict[str, int]:
        """What this rank has left out: bad chunks so far, users without a past in the last pass."""
        return {
            "users_without_history": self._without_history,
            "chunks_skipped": len(self._reader.skipped),
            "users_in_skipped_chunks": sum(self._reader.skipped.values()),
            **self._reading.counters,
        }

    def batches(self) -> Iterator[SequenceBatch]:
        """This rank's batches; ranks can differ by a few in their number."""
        self._without_history = 0
        waiting, missing = [], self._batch_users
        for block in self._blocks():
            start = 0
            while start < block.num_users:
                stop = min(start + missing, block.num_users)
                waiting.append(block.select(start, stop))
                start, missing = stop, missing - (stop - start)
                if missing == 0:
                    yield collate(waiting)
                    waiting, missing = [], self._batch_users
        if waiting:
            yield collate(waiting)

    def empty_batch(self) -> SequenceBatch:
        """A batch without users, for a rank that has evaluated all of its own."""
        nobody = np.zeros(0, dtype=np.int64)
        return collate(
            [self._block(self._reader.no_events(), nobody, nobody, nobody, nobody, self._reader.no_pages(0))]
        )

    def _blocks(self) -> Iterator[UserBlock]:
        for piece in told(self._pieces):
            read = self._reader.read(piece)
            if read is not None:
                chunk, pages = read
                columns = event_columns(chunk, self._config.columns)
                places, known, held_out = self._spans(chunk)
                yield self._block(
                    columns,
                    chunk.users[places],
                    chunk.offsets[places],
                    known,
                    held_out,
                    pages and pages.take(places),
                )

    def _spans(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Place in the chunk, number of known events and index of the held-out event of each user of the split."""
        if self._split == "serve":
            held_out = known = chunk.lengths.astype(np.int64)
        else:
            held_out = chunk.valid_at if self._split == "valid" else chunk.test_at
            known = self._reading.known_events(chunk, held_out)
        if self._rows is not None:
            known = np.where(np.isin(chunk.users, self._rows), known, -1)
        if self._user_share < 1:
            known = np.where(drawn_users(chunk.users, self._user_share), known, -1)
        if self._action is not None and self._split != "serve":
            # Without a held-out event (-1) any action is read, or none; the user is left out as it is.
            actions = np.append(chunk.columns[ACTION], NO_ACTION)[chunk.offsets[:-1] + held_out]
            known = np.where(actions == self._action, known, -1)
        self._without_history += int(((known == 0) & (held_out >= 0)).sum())
        places = np.flatnonzero(known > 0)
        return places, known[places], chunk.offsets[places] + held_out[places]

    def _block(
        self,
        columns: Mapping,
        users: np.ndarray,
        starts: np.ndarray,
        known: np.ndarray,
        held_out: np.ndarray,
        pages: PageTable | None,
    ) -> UserBlock:
        """Shapes: users, starts, known, held_out [U]; columns [T of the chunk]."""
        lengths = np.minimum(known, self._config.max_length)
        index = gather_ranges(starts + known - lengths, lengths)
        items = columns[ITEM]
        return UserBlock(
            user_ids=users.astype(np.int64),
            offsets=offsets_of(lengths),
            inputs={name: column[index] for name, column in columns.items()},
            held_out=None if self._split == "serve" else items[held_out],
            seen=items[gather_ranges(starts, known)],
            seen_offsets=offsets_of(known),
            pages=pages and pages.within(known - lengths, lengths),
        )
