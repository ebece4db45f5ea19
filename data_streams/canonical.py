"""Canonical streams: the order in which an epoch serves its users, whatever machines read it.

The chunks of an epoch, in shuffled order, form one line of users. The line is cut into `num_streams`
intervals of equal weight; each interval is a stream. Inside a stream the users of some consecutive chunks
(a group) are shuffled together. All of it follows from (seed, epoch), so any rank can take a stream over at
any of its users.
"""

import logging
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import DataError
from cluster.seeds import purpose_seed
from cluster.storage import Storage
from data_streams.configuration import DataConfig
from data_streams.jagged import gather_ranges, offsets_of
from data_streams.manifest import Manifest
from data_streams.page_table import PageTable, concatenate
from data_streams.shards import Chunk, read_chunk
from data_streams.target_pages import EventReading
from data_streams.token_budget import step_of_users, training_tokens
from data_streams.user_block import ITEM, UserBlock

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
    """Cuts a line of chunks into parts of equal weight; the users of a chunk on a border are divided."""

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


def deal_epoch(
    manifest: Manifest, config: DataConfig, seed: int, epoch: int, history_share: float = 1.0
) -> Deal:
    """The streams of one training epoch, nearly equal in tokens; `history_share` as in `token_budget`."""
    num_users = np.array([record.num_users for record in manifest.chunks], dtype=np.int64)
    longest = round(config.max_length / history_share)
    weights = [record.tokens_cut_to(longest) for record in manifest.chunks]
    order = generator(seed, "chunk order", epoch).permutation(len(manifest.chunks))
    return Deal(order, np.array(weights, dtype=np.int64), num_users, config.num_streams)


def generator(seed: int, purpose: str, *place: int) -> np.random.Generator:
    """A generator of its own for each purpose and place, such as (epoch, stream, group)."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *place])


class ChunkReader:
    """Reads chunks of one data set; what a bad one does is `DataConfig.on_bad_shard`."""

    def __init__(self, storage: Storage, manifest: Manifest, config: DataConfig, reading: EventReading):
        self._storage, self._manifest, self._config, self._reading = storage, manifest, config, reading
        self.skipped: dict[int, int] = {}
        """Chunk index -> users lost with it."""

    def no_events(self) -> dict[str, np.ndarray]:
        """The same columns as `event_columns`, of zero events."""
        types = {ITEM: "int64"} | {name: self._manifest.columns[name] for name in self._config.columns}
        return {name: np.zeros(0, dtype=dtype) for name, dtype in types.items()}

    def no_pages(self, num_users: int) -> PageTable | None:
        """What `read` gives for users without any page."""
        return PageTable.empty(num_users) if self._reading.has_pages else None

    def read(self, piece: Piece, seed: int = 0) -> tuple[Chunk, PageTable | None] | None:
        """The histories of the users of a piece and, where they are asked for, their pages.

        None where the chunk is bad and such chunks are skipped. `seed` draws the borders of training pages.
        """
        index, record = piece.chunk, self._manifest.chunks[piece.chunk]
        columns = tuple(dict.fromkeys((*self._config.columns, *self._reading.columns)))
        try:
            chunk = read_chunk(self._storage, record, manifest=self._manifest, columns=columns)
        except DataError as error:
            if self._config.on_bad_shard == "fail":
                raise
            if index not in self.skipped:
                self.skipped[index] = record.num_users
                log.warning("Skipped %d users of a bad chunk: %s", record.num_users, error)
            return None
        users = chunk.select(piece.start, piece.stop)
        return self._reading.history(users), self._reading.pages(users, seed)


@dataclass(frozen=True, kw_only=True)
class TrainingGroup:
    """The training users of a group in serving order."""

    users: UserBlock
    tokens: np.ndarray
    """[U] int64, training inputs of each user."""
    places: np.ndarray
    """[U] int64, rising: place of each user in the shuffled order of all users the manifest counts here.

    Counting by the manifest keeps a position valid when a chunk turns bad, or is repaired, between two runs.
    """


def read_group(
    reader: ChunkReader,
    pieces: Sequence[Piece],
    config: DataConfig,
    random: np.random.Generator,
    page_seed: int,
) -> TrainingGroup:
    """Read the chunks of a group and gather the events of its training users in shuffled order."""
    slots, events, tables, num_events = [], [reader.no_events()], [], 0
    for piece in pieces:
        read = reader.read(piece, page_seed)
        if read is None:
            slots.append(np.zeros((4, piece.num_users), dtype=np.int64))
            tables.append(reader.no_pages(piece.num_users))
            continue
        chunk, pages = read
        slots.append(_training_spans(chunk, num_events, config.max_length))
        tables.append(pages)
        events.append(event_columns(chunk, config.columns))
        num_events += chunk.num_events
    order = random.permutation(sum(piece.num_users for piece in pieces))
    shuffled = np.concatenate(slots, axis=1)[:, order]
    places = np.flatnonzero(shuffled[2])
    user_ids, starts, tokens, skipped = shuffled[:, places]
    index = gather_ranges(starts, tokens)
    columns = {name: np.concatenate([part[name] for part in events]) for name in events[0]}
    users = UserBlock(
        user_ids=user_ids,
        offsets=offsets_of(tokens),
        inputs={name: column[index] for name, column in columns.items()},
        targets={name: column[index + 1] for name, column in columns.items()},
        pages=_training_pages(tables, order[places], skipped, tokens),
    )
    return TrainingGroup(users=users, tokens=tokens, places=places)


def event_columns(chunk: Chunk, columns: Collection[str]) -> dict[str, np.ndarray]:
    """The item rows (as int64) and the asked-for columns of all events of a chunk. Shapes: [T] each."""
    return {ITEM: chunk.items.astype(np.int64)} | {name: chunk.columns[name] for name in columns}


def _training_spans(chunk: Chunk, first_event: int, max_length: int) -> np.ndarray:
    """User row, first input, number of inputs and of events before them. Shapes: [4, users of the chunk]."""
    tokens = training_tokens(chunk.train_end, max_length)
    skipped = chunk.train_end - 1 - tokens
    return np.stack([chunk.users, first_event + chunk.offsets[:-1] + skipped, tokens, skipped])


def _training_pages(
    tables: Sequence[PageTable | None], users: np.ndarray, skipped: np.ndarray, tokens: np.ndarray
) -> PageTable | None:
    """Shapes: users [U] places among the users of all tables; skipped and tokens [U]."""
    if tables[0] is None:
        return None
    return concatenate(tables).take(users).within(skipped, tokens)


class CanonicalStream:
    """One stream of one epoch, read group by group; it can be left and taken up again at any user."""

    def __init__(
        self,
        reader: ChunkReader,
        pieces: Sequence[Piece],
        config: DataConfig,
        place: tuple[int, int, int],
        state: Mapping[str, int] | None = None,
    ):
        """`place` is (seed, epoch, stream); `state` is what `state()` gave where reading is to go on."""
        self._reader, self._config, self._place = reader, config, place
        self._groups = [
            pieces[first : first + config.shuffle_chunks]
            for first in range(0, len(pieces), config.shuffle_chunks)
        ]
        state = state or {"group": 0, "user": 0, "tokens": 0}
        self._group_index, self._tokens = state["group"], state["tokens"]
        self._group: TrainingGroup | None = None
        self._cursor, self._first_place = 0, state["user"]

    def has_users(self) -> bool:
        """Whether a user is still to be served; reads the next group where that is needed to know."""
        while self._group_index < len(self._groups):
            if self._group is None:
                self._open_group()
            if self._cursor < len(self._group.tokens):
                return True
            self._group, self._first_place = None, 0
            self._group_index += 1
        return False

    def take(self, step: int) -> list[UserBlock]:
        """The users this step serves; empty where a long user has already used up its budget."""
        blocks = []
        while self.has_users():
            stop = int(np.searchsorted(self._steps, step, side="right"))
            if stop <= self._cursor:
                break
            blocks.append(self._group.users.select(self._cursor, stop))
            self._tokens += int(self._group.tokens[self._cursor : stop].sum())
            self._cursor = stop
        return blocks

    def state(self) -> dict[str, int]:
        """Where the stream stands: group, place of the next user in it, tokens served since the start."""
        if self._group is None:
            user = self._first_place
        elif self._cursor < len(self._group.places):
            user = int(self._group.places[self._cursor])
        else:
            return {"group": self._group_index + 1, "user": 0, "tokens": self._tokens}
        return {"group": self._group_index, "user": user, "tokens": self._tokens}

    def _open_group(self) -> None:
        seed, epoch, stream = self._place
        random = generator(seed, "user order", epoch, stream, self._group_index)
        pieces, page_seed = self._groups[self._group_index], purpose_seed(seed, "page borders", epoch)
        self._group = read_group(self._reader, pieces, self._config, random, page_seed)
        self._cursor = int(np.searchsorted(self._group.places, self._first_place))
        remaining = step_of_users(self._group.tokens[self._cursor :], self._tokens, self._config)
        self._steps = np.concatenate([np.full(self._cursor, -1), remaining])
