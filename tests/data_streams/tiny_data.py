"""Small data sets, written chunk by chunk, for the tests of the reading side."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cluster.storage import Storage
from data_streams.manifest import Manifest
from data_streams.shards import Chunk, ShardWriter

NUM_ITEMS = 1000


def make_chunk(lengths: Sequence[int], *, first_user: int = 0, seed: int = 0) -> Chunk:
    """Users of the given numbers of events; the last two are held out where a user has three or more."""
    random = np.random.default_rng(seed)
    lengths = np.asarray(lengths, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    long = lengths >= 3
    times = [np.sort(random.integers(0, 10**9, length)) for length in lengths]
    return Chunk(
        users=np.arange(first_user, first_user + len(lengths)),
        offsets=offsets,
        train_end=np.where(long, lengths - 2, lengths).astype(np.int32),
        valid_at=np.where(long, lengths - 2, -1).astype(np.int32),
        test_at=np.where(long, lengths - 1, -1).astype(np.int32),
        items=random.integers(0, NUM_ITEMS, offsets[-1]).astype(np.int32),
        columns={
            "timestamp_s": np.concatenate([np.zeros(0, dtype=np.int64), *times]),
            "action": random.integers(0, 4, offsets[-1]).astype(np.int8),
        },
    )


def random_lengths(num_users: int, *, longest: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, longest + 1, num_users)


def write_data_set(
    path: Path, chunk: Chunk, *, chunk_users: int = 16, chunks_per_shard: int = 4, **manifest
) -> Manifest:
    """Write one partition and its manifest; keyword arguments override fields of the manifest."""
    storage = Storage(path)
    writer = ShardWriter(storage, 0, chunk_users=chunk_users, chunks_per_shard=chunks_per_shard)
    writer.write(chunk)
    lengths, users = np.unique(chunk.train_end, return_counts=True)
    result = Manifest(
        source={"name": "tiny"},
        num_users=chunk.num_users,
        num_items=NUM_ITEMS,
        num_events=chunk.num_events,
        split={"name": "leave-last-out"},
        columns={name: str(column.dtype) for name, column in chunk.columns.items()},
        train_length_counts=dict(zip(lengths.tolist(), users.tolist(), strict=True)),
        chunks=writer.close(),
    )
    result = replace(result, **manifest)
    result.save(storage)
    return result


def user_events(chunk: Chunk, user: int, column: str = "item") -> np.ndarray:
    """All values of one column of a user."""
    values = chunk.items if column == "item" else chunk.columns[column]
    return values[chunk.offsets[user] : chunk.offsets[user + 1]]


def damage(path: Path, manifest: Manifest, index: int) -> None:
    """Flip one byte in the middle of a chunk."""
    record = manifest.chunks[index]
    file = path / record.shard
    data = bytearray(file.read_bytes())
    data[(record.start + record.stop) // 2] ^= 0xFF
    file.write_bytes(bytes(data))


def users_by_step(batches: Mapping[int, Sequence]) -> list[list[int]]:
    """Users of each step over all ranks, sorted; `batches` holds each rank's batches in order."""
    steps = max(map(len, batches.values()))
    ranks = [[batch.user_ids.tolist() for batch in own] for own in batches.values()]
    return [sorted(user for own in ranks if step < len(own) for user in own[step]) for step in range(steps)]
