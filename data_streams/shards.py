"""The shard format: tar files of columnar chunks and the manifest that lists them.

A data set is a folder (local or any fsspec address) with

    manifest.json             what the shards hold, and where each chunk lies (`Manifest`)
    items.parquet             one row per item, in item-row order
    users.parquet             optional: one row per user, in user-row order
    item_embeddings.npy       optional: [N, E], row i belongs to item row i
    shards/part-00000-00000.tar

A tar member is called KEY.NAME.npy and holds one array; the members of one KEY make up one chunk of some
hundred users. A chunk is read by one byte-range request, checked against its SHA-256 and never unpickled.
"""

import hashlib
import io
import math
import tarfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from webdataset.tariterators import tar_file_iterator
from webdataset.writer import TarWriter

from cluster.errors import DataError
from cluster.storage import Storage
from data_streams.manifest import REBUILD, ChunkRecord, Manifest

MAX_SHARD_BYTES = 256 * 2**20

_USER_ARRAYS = {"user": "users", "train_end": "train_end", "valid_at": "valid_at", "test_at": "test_at"}
_STRUCTURE = (*_USER_ARRAYS, "offsets", "item")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The events of some hundred users, column by column.

    Shapes: U users, T events in all; a user's events lie at offsets[u]..offsets[u + 1], oldest first.
    """

    users: np.ndarray
    """[U] int64, user rows."""
    offsets: np.ndarray
    """[U + 1] int64, offsets[0] == 0."""
    train_end: np.ndarray
    """[U] int32: the user's events [0, train_end) are for training."""
    valid_at: np.ndarray
    """[U] int32, index within the user of the validation target; -1 for none."""
    test_at: np.ndarray
    """[U] int32, index within the user of the test target; -1 for none."""
    items: np.ndarray
    """[T] int32 or int64, item rows."""
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """[T] each, further event columns (timestamp_s, action, page_id, position, ...)."""

    @property
    def num_users(self) -> int:
        return len(self.users)

    @property
    def num_events(self) -> int:
        return len(self.items)

    @property
    def lengths(self) -> np.ndarray:
        return self.offsets[1:] - self.offsets[:-1]

    @cached_property
    def user_index(self) -> np.ndarray:
        """Place in the chunk of each event's user. Shapes: [T] int64."""
        return np.repeat(np.arange(self.num_users), self.lengths)

    @cached_property
    def places(self) -> np.ndarray:
        """Place of each event within its user, from 0. Shapes: [T] int64."""
        return np.arange(self.num_events) - self.offsets[self.user_index]

    def select(self, start: int, stop: int) -> "Chunk":
        """Users start..stop (exclusive) as a chunk of their own."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return Chunk(
            users=self.users[start:stop],
            offsets=self.offsets[start : stop + 1] - first,
            train_end=self.train_end[start:stop],
            valid_at=self.valid_at[start:stop],
            test_at=self.test_at[start:stop],
            items=self.items[first:last],
            columns={name: column[first:last] for name, column in self.columns.items()},
        )


class ShardWriter:
    """Writes the chunks of one user partition into tar shards, holding one shard in memory at a time."""

    def __init__(self, storage: Storage, part: int, chunk_users: int = 512, chunks_per_shard: int = 64):
        self._storage, self._part = storage, part
        self._chunk_users, self._chunks_per_shard = chunk_users, chunks_per_shard
        self._records: list[ChunkRecord] = []
        self._num_shards = 0
        self._open_shard()

    def write(self, chunk: Chunk) -> None:
        """Append users; more than `chunk_users` become several chunks, fewer stay a chunk of their own."""
        check_chunk(chunk, f"the chunk given to part {self._part}")
        for start in range(0, chunk.num_users, self._chunk_users):
            self._append(chunk.select(start, min(start + self._chunk_users, chunk.num_users)))

    def close(self) -> list[ChunkRecord]:
        """Write the last shard and return the records for the manifest, in the order of writing."""
        self._finish_shard()
        return self._records

    def _append(self, chunk: Chunk) -> None:
        key = f"{self._part:05d}-{len(self._records) + len(self._pending):07d}"
        start = self._tar.tarstream.offset
        self._tar.write({"__key__": key} | {f"{name}.npy": data for name, data in _members(chunk).items()})
        stop = self._tar.tarstream.offset
        self._pending.append((start, stop, _chunk_counts(chunk)))
        if len(self._pending) >= self._chunks_per_shard or stop >= MAX_SHARD_BYTES:
            self._finish_shard()
            self._open_shard()

    def _open_shard(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = TarWriter(self._buffer, encoder=False, mtime=0)
        self._pending: list[tuple[int, int, dict[str, Any]]] = []

    def _finish_shard(self) -> None:
        self._tar.close()
        if not self._pending:
            return
        name = f"shards/part-{self._part:05d}-{self._num_shards:05d}.tar"
        data = self._buffer.getvalue()
        self._storage.write(name, data)
        for start, stop, counts in self._pending:
            digest = hashlib.sha256(memoryview(data)[start:stop]).hexdigest()
            self._records.append(ChunkRecord(shard=name, start=start, stop=stop, sha256=digest, **counts))
        self._num_shards += 1
        self._pending = []


def read_chunk(
    storage: Storage,
    record: ChunkRecord,
    *,
    manifest: Manifest | None = None,
    columns: Collection[str] | None = None,
) -> Chunk:
    """Fetch one chunk by its byte range and check it; with a manifest, ids are checked against its counts.

    Only the named columns are kept (None keeps all); times are checked where the shard has them.

    Raises: DataError naming the shard and the chunk, when it is missing, truncated, altered or inconsistent.
    """
    where = f"{record} in {storage.root}"
    data = _read_bytes(storage, record, where)
    arrays = _parse_members(data, where, None if columns is None else {*columns, "timestamp_s"})
    missing = [name for name in (*_STRUCTURE, *(columns or ())) if name not in arrays]
    if missing:
        raise DataError(f"{where} lacks the arrays {', '.join(missing)}; {REBUILD}")
    chunk = Chunk(
        offsets=arrays["offsets"],
        items=arrays["item"],
        columns={name: array for name, array in arrays.items() if name not in _STRUCTURE},
        **{attribute: arrays[name] for name, attribute in _USER_ARRAYS.items()},
    )
    check_chunk(chunk, where)
    if (chunk.num_users, chunk.num_events) != (record.num_users, record.num_events):
        raise DataError(
            f"{where} holds {chunk.num_users} users and {chunk.num_events} events, its manifest says "
            f"{record.num_users} and {record.num_events}; {REBUILD}"
        )
    if manifest is not None:
        _check_range(chunk.items, manifest.num_items, "item", where)
        _check_range(chunk.users, manifest.num_users, "user", where)
    return chunk


def check_chunk(chunk: Chunk, where: str) -> None:
    """Raises: DataError when the arrays of a chunk do not fit together or a user's times run backwards."""
    integers = {"offsets": chunk.offsets, "item": chunk.items}
    integers |= {name: getattr(chunk, attribute) for name, attribute in _USER_ARRAYS.items()}
    for name, array in integers.items():
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(f"{where}: {name} must be a vector of integers, is {array.dtype} {array.shape}")
    _check_offsets(chunk, where)
    for name, attribute in _USER_ARRAYS.items():
        _check_length(getattr(chunk, attribute), chunk.num_users, name, "users", where)
    for name, column in chunk.columns.items():
        _check_length(column, chunk.num_events, name, "events", where)
        if column.dtype.kind not in "iufb":
            raise DataError(f"{where}: {name} must hold numbers, is {column.dtype}; {REBUILD}")
    lengths = chunk.lengths
    if ((chunk.train_end < 0) | (chunk.train_end > lengths)).any():
        raise DataError(f"{where}: train_end must lie within each user's events; {REBUILD}")
    for name, target in (("valid_at", chunk.valid_at), ("test_at", chunk.test_at)):
        if ((target < -1) | (target >= lengths)).any():
            raise DataError(f"{where}: {name} must be -1 or an event of the user; {REBUILD}")
        if ((target >= 0) & (target < chunk.train_end)).any():
            raise DataError(f"{where}: {name} must not be one of the user's training events; {REBUILD}")
    if "timestamp_s" in chunk.columns:
        _check_times(chunk, where)


def _check_offsets(chunk: Chunk, where: str) -> None:
    offsets = chunk.offsets
    good = len(offsets) == chunk.num_users + 1 and offsets[0] == 0 and offsets[-1] == chunk.num_events
    if not good or (chunk.lengths < 0).any():
        raise DataError(
            f"{where}: offsets must be {chunk.num_users + 1} numbers rising from 0 to {chunk.num_events} "
            f"(users + 1, number of events); {REBUILD}"
        )


def _check_length(array: np.ndarray, length: int, name: str, unit: str, where: str) -> None:
    if array.shape != (length,):
        raise DataError(
            f"{where}: {name} must have one value for each of {length} {unit}, its shape is {array.shape}; "
            f"{REBUILD}"
        )


def _check_times(chunk: Chunk, where: str) -> None:
    backwards = np.diff(chunk.columns["timestamp_s"]) < 0
    borders = chunk.offsets[1:-1]
    backwards[borders[(borders > 0) & (borders < chunk.num_events)] - 1] = False
    if backwards.any():
        user = np.searchsorted(chunk.offsets, backwards.argmax(), side="right") - 1
        raise DataError(
            f"{where}: the events of user row {chunk.users[user]} are not in order of time; sort each user's "
            f"events by timestamp_s and {REBUILD}"
        )


def _check_range(ids: np.ndarray, bound: int, unit: str, where: str) -> None:
    if len(ids) and (ids.min() < 0 or ids.max() >= bound):
        raise DataError(
            f"{where}: {unit} ids must lie in 0..{bound - 1} (the manifest counts {bound} {unit}s), found "
            f"{ids.min()}..{ids.max()}; {REBUILD}"
        )


def _read_bytes(storage: Storage, record: ChunkRecord, where: str) -> bytes:
    try:
        data = storage.read(record.shard, record.start, record.stop)
    except FileNotFoundError as error:
        raise DataError(f"{where}: the shard is missing; copy it again or {REBUILD}") from error
    if len(data) != record.stop - record.start:
        raise DataError(
            f"{where}: the shard is truncated, {record.stop - record.start} bytes are needed and "
            f"{len(data)} are there; copy it again or {REBUILD}"
        )
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise DataError(
            f"{where}: the checksum is not that of the manifest, the bytes were altered; copy the shard "
            f"again or {REBUILD}"
        )
    return data


def _parse_members(data: bytes, where: str, columns: set[str] | None) -> dict[str, np.ndarray]:
    """The arrays of a chunk by name. Arrays of Python objects are refused, nothing is unpickled."""

    def is_wanted(member: str) -> bool:
        return columns is None or _array_name(member) in columns.union(_STRUCTURE)

    arrays = {}
    try:
        for file in tar_file_iterator(io.BytesIO(data), select_files=is_wanted):
            arrays[_array_name(file["fname"])] = _array(file["data"])
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{where} is not a tar of plain NumPy arrays ({error}); {REBUILD}") from error
    return arrays


def _array(content: bytes) -> np.ndarray:
    """A read-only view of the numbers in a .npy file."""
    start = 10 + int.from_bytes(content[8:10], "little")
    shape, dtype = _parse_header(content[:start])
    return np.frombuffer(content, dtype, count=math.prod(shape), offset=start).reshape(shape)


@lru_cache(maxsize=4096)
def _parse_header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type; kept, since most arrays of a data set share a header and parsing costs more than reading."""
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"an array has version {version} of the .npy format instead of (1, 0)")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        raise ValueError("an array holds Python objects")
    return shape, dtype


def _array_name(member: str) -> str:
    """Example: 00000-0000003.timestamp_s.npy is the array timestamp_s."""
    return member.partition(".")[2].removesuffix(".npy")


def _members(chunk: Chunk) -> dict[str, bytes]:
    arrays = {name: getattr(chunk, attribute) for name, attribute in _USER_ARRAYS.items()}
    arrays |= {"offsets": chunk.offsets, "item": chunk.items} | dict(chunk.columns)
    return {name: _npy_bytes(array) for name, array in arrays.items()}


def _npy_bytes(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


def _chunk_counts(chunk: Chunk) -> dict[str, Any]:
    tokens = np.maximum(chunk.train_end.astype(np.int64) - 1, 0)
    powers = range(int(tokens.max(initial=1) - 1).bit_length() + 1)
    return {
        "num_users": chunk.num_users,
        "num_events": chunk.num_events,
        "num_train_users": int((tokens > 0).sum()),
        "train_tokens": int(tokens.sum()),
        "train_tokens_by_cut": tuple(int(np.minimum(tokens, 2**power).sum()) for power in powers),
    }
