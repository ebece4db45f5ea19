"""Canonical streams: the order in which an epoch serves its users, whatever machines read it.

The chunks of an epoch, in shuffled order, form one line of users. The line is cut into `num_streams` intervals of
equal weight; each interval is a stream. Inside a stream the users of some consecutive chunks (a group) are shuffled
together. All of it follows from (seed, epoch), so a stream can be taken over by any rank at any of its users.
"""

import logging
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import DataError
from cluster.storage import Storage
from data_streams.configuration import DataConfig
from data_streams.manifest import Manifest
from data_streams.shards import Chunk, read_chunk
from data_streams.token_budget import step_of_users, training_tokens
from data_streams.user_block import ITEM, UserBlock, gather_ranges, offsets_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Users start..stop (exclusive) of one chunk: the unit that is dealt."""

    chunk: int
    """Index of the chunk in the manifest."""
    start: int
    stop: int

    @property
    def num_users(self) -> int:
        return self.stop - self.start


class Deal:
    """Cuts a line of chunks into parts of equal weight; a chunk on a border is shared by user, never twice."""

    def __init__(self, order: np.ndarray, weights: np.ndarray, num_users: np.ndarray, num_parts: int):
        """Shapes: order [C] chunk indices; weights, num_users [C] by chunk index, int64."""
        self._order = order[weights[order] > 0]
        self._weights, self._num_users, self._num_parts = weights, num_users, num_parts
        self._ends = np.cumsum(weights[self._order])

    def pieces(self, part: int) -> list[Piece]:
        total = int(self._ends[-1]) if len(self._ends) else 0
        low, high = part * total // self._num_parts, (part + 1) * total // self._num_parts
        first, last = np.searchsorted(self._ends, [low, high - 1], side="right")
        pieces = [self._cut(place, low, high) for place in range(first, last + 1)] if low < high else []
        return [piece for piece in pieces if piece.num_users]

    def _cut(self, place: int, low: int, high: int) -> Piece:
        """The users of the chunk at this place of the line whose weight lies in low..high."""
        chunk = int(self._order[place])
        weight, num_users = int(self._weights[chunk]), int(self._num_users[chunk])
        begin = int(self._ends[place]) - weight
        start = max(low - begin, 0) * num_users // weight
        stop = min(high - begin, weight) * num_users // weight
        return Piece(chunk=chunk, start=start, stop=stop)


def deal_epoch(manifest: Manifest, config: DataConfig, seed: int, epoch: int) -> Deal:
    """The streams of one training epoch, nearly equal in tokens."""
    train_tokens = np.array([record.train_tokens for record in manifest.chunks], dtype=np.int64)
    train_users = np.array([record.num_train_users for record in manifest.chunks], dtype=np.int64)
    num_users = np.array([record.num_users for record in manifest.chunks], dtype=np.int64)
    weights = np.minimum(train_tokens, train_users * config.max_length)
    order = generator(seed, "chunk order", epoch).permutation(len(manifest.chunks))
    return Deal(order, weights, num_users, config.num_streams)


def generator(seed: int, purpose: str, *place: int) -> np.random.Generator:
    """A generator of its own for each purpose and place, such as (epoch, stream, group)."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *place])


class ChunkReader:
    """Reads chunks of one data set; what a bad one does is `DataConfig.on_bad_shard`."""

    def __init__(self, storage: Storage, manifest: Manifest, config: DataConfig):
        self._storage, self._manifest, self._config = storage, manifest, config
        self.skipped: dict[int, int] = {}
        """Chunk index -> users lost with it."""

    def read(self, index: int) -> Chunk | None:
        """The chunk, or None where it is bad and such chunks are skipped."""
        record = self._manifest.chunks[index]
        try:
            return read_chunk(self._storage, record, manifest=self._manifest, columns=self._config.columns)
        except DataError as error:
            if self._config.on_bad_shard == "fail":
                raise
            if index not in self.skipped:
                self.skipped[index] = record.num_users
                log.warning("Skipped %d users of a bad chunk: %s", record.num_users, error)
            return None


@dataclass(frozen=True, kw_only=True)
class TrainingGroup:
    """The training users of a group in serving order."""

    users: UserBlock
    tokens: np.ndarray
    """[U] int64, training inputs of each user."""
    places: np.ndarray
    """[U] int64, rising: place of each user in the shuffled order of all users the manifest counts in the group.

    Counting by the manifest keeps a position valid when a chunk turns bad, or is repaired, between two runs.
    """


def read_group(
    reader: ChunkReader, pieces: Sequence[Piece], config: DataConfig, random: np.random.Generator
) -> TrainingGroup:
    """Read the chunks of a group and gather the events of its training users in shuffled order."""
    order = random.permutation(sum(piece.num_users for piece in pieces))
    parts = [(piece, reader.read(piece.chunk)) for piece in pieces]
    slots, user_ids, starts, tokens, events = [], [], [], [], []
    first_slot = first_event = 0
    for piece, chunk in parts:
        if chunk is not None:
            users = slice(piece.start, piece.stop)
            count = training_tokens(chunk.train_end[users], config.max_length)
            starts.append(first_event + chunk.offsets[:-1][users] + chunk.train_end[users] - 1 - count)
            tokens.append(count)
            user_ids.append(chunk.users[users])
            slots.append(np.arange(first_slot, first_slot + piece.num_users))
            events.append(event_columns(chunk, config.columns))
            first_event += chunk.num_events
        first_slot += piece.num_users
    slot_tokens, slot_starts, slot_users = np.zeros((3, len(order)), dtype=np.int64)
    if slots:
        present = np.concatenate(slots)
        slot_tokens[present] = np.concatenate(tokens)
        slot_starts[present] = np.concatenate(starts)
        slot_users[present] = np.concatenate(user_ids)
    places = np.flatnonzero(slot_tokens[order])
    served = order[places]
    index = gather_ranges(slot_starts[served], slot_tokens[served])
    columns = join_columns(events, config.columns)
    users = UserBlock(
        user_ids=slot_users[served],
        offsets=offsets_of(slot_tokens[served]),
        inputs={name: column[index] for name, column in columns.items()},
        targets={name: column[index + 1] for name, column in columns.items()},
    )
    return TrainingGroup(users=users, tokens=slot_tokens[served], places=places)
