"""Damaged and inconsistent shards: each a clear error, or a counted skip by policy; nothing is unpickled."""

import io
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import DataError
from cluster.storage import Storage
from data_streams import shards
from data_streams.configuration import DataConfig
from data_streams.evaluation_stream import EvaluationStream
from data_streams.manifest import Manifest
from data_streams.shards import Chunk, ShardWriter, read_chunk
from data_streams.stream import TrainStream
from tests.data_streams.tiny_data import NUM_ITEMS, damage, make_chunk, random_lengths, write_data_set


@pytest.fixture
def data(tmp_path) -> tuple[Path, Manifest]:
    return tmp_path, write_data_set(
        tmp_path, make_chunk(random_lengths(64)), chunk_users=16, chunks_per_shard=2
    )


def read(path: Path, manifest: Manifest, index: int = 0) -> Chunk:
    return read_chunk(Storage(path), manifest.chunks[index], manifest=manifest)


def write_unchecked(path: Path, chunk: Chunk, monkeypatch) -> Manifest:
    """A data set whose checksums are right but whose arrays were never looked at."""
    with monkeypatch.context() as patch:
        patch.setattr(shards, "check_chunk", lambda chunk, where: None)
        return write_data_set(path, chunk)


def test_a_missing_shard_is_named_with_its_chunk(data):
    path, manifest = data
    (path / manifest.chunks[0].shard).unlink()
    with pytest.raises(
        DataError, match=r"chunk at bytes 0\.\.\d+ of shard shards/part-00000-00000.tar.*is missing"
    ):
        read(path, manifest)


def test_a_truncated_shard_says_how_much_is_there(data):
    path, manifest = data
    record = manifest.chunks[1]
    shard = path / record.shard
    shard.write_bytes(shard.read_bytes()[: record.start + 100])
    needed = record.stop - record.start
    with pytest.raises(DataError, match=f"is truncated, {needed} bytes are needed and 100 are there"):
        read(path, manifest, 1)
    assert read(path, manifest, 0).num_users == 16


def test_altered_bytes_do_not_pass_the_checksum(data):
    path, manifest = data
    damage(path, manifest, 2)
    with pytest.raises(DataError, match=r"part-00000-00001.tar.*the checksum is not that of the manifest"):
        read(path, manifest, 2)


def test_item_ids_beyond_the_vocabulary_are_refused(data):
    path, manifest = data
    with pytest.raises(DataError, match=r"item ids must lie in 0\.\.9 .*counts 10 items"):
        read(path, replace(manifest, num_items=10))


def test_negative_item_ids_are_refused(tmp_path):
    chunk = make_chunk([3, 4])
    manifest = write_data_set(tmp_path, replace(chunk, items=chunk.items - NUM_ITEMS))
    with pytest.raises(DataError, match=r"item ids must lie in 0\.\.999 .*found -"):
        read(tmp_path, manifest)


def test_user_ids_beyond_the_vocabulary_are_refused(data):
    path, manifest = data
    with pytest.raises(DataError, match=r"user ids must lie in 0\.\.4 .*found 0\.\.15"):
        read(path, replace(manifest, num_users=5))


def unsorted(chunk: Chunk) -> Chunk:
    times = chunk.columns["timestamp_s"].copy()
    times[chunk.offsets[1] : chunk.offsets[2]] = times[chunk.offsets[1] : chunk.offsets[2]][::-1]
    return replace(chunk, columns={**chunk.columns, "timestamp_s": times})


BROKEN = {
    "unsorted times": (unsorted, "the events of user row 1 are not in order of time"),
    "falling offsets": (
        lambda chunk: replace(chunk, offsets=np.array([0, 5, 3, 12])),
        r"offsets must be 4 numbers rising from 0 to 12 \(users \+ 1, number of events\)",
    ),
    "short offsets": (lambda chunk: replace(chunk, offsets=chunk.offsets[:-1]), "offsets must be 4 numbers"),
    "training span too long": (
        lambda chunk: replace(chunk, train_end=chunk.train_end + 50),
        "train_end must lie within each user's events",
    ),
    "target outside": (
        lambda chunk: replace(chunk, test_at=chunk.test_at + 1),
        "test_at must be -1 or an event",
    ),
    "target among training": (
        lambda chunk: replace(chunk, valid_at=np.zeros(3, dtype=np.int32)),
        "valid_at must not be one of the user's training events",
    ),
    "short column": (
        lambda chunk: replace(chunk, columns={"action": np.zeros(3, dtype=np.int8)}),
        "action must have one value for each of 12 events",
    ),
    "short user array": (
        lambda chunk: replace(chunk, train_end=chunk.train_end[:2]),
        "train_end must have one value for each of 3 users",
    ),
    "real item ids": (
        lambda chunk: replace(chunk, items=chunk.items.astype(np.float32)),
        "item must be a vector of integers",
    ),
    "text column": (
        lambda chunk: replace(chunk, columns={"city": np.full(12, "Ulm")}),
        "city must hold numbers",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_inconsistent_chunks_are_refused_by_the_reader_and_by_the_writer(case, tmp_path, monkeypatch):
    break_it, message = BROKEN[case]
    broken = break_it(make_chunk([3, 4, 5]))
    with pytest.raises(DataError, match=message):
        ShardWriter(Storage(tmp_path / "refused"), 0).write(broken)
    if "short" not in case and "offsets" not in case:
        manifest = write_unchecked(tmp_path, broken, monkeypatch)
        with pytest.raises(DataError, match=f"shards/part-00000-00000.tar.*{message}"):
            read(tmp_path, manifest)


def test_a_manifest_with_other_counts_is_refused(data):
    path, manifest = data
    record = replace(manifest.chunks[0], num_users=15)
    with pytest.raises(DataError, match=r"holds 16 users and .* its manifest says 15"):
        read_chunk(Storage(path), record)


class Bomb:
    """Ends the test when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("data was unpickled",)


def pickled_array() -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([Bomb(), Bomb()], dtype=object), allow_pickle=True)
    return content.getvalue()


def zipped_arrays() -> bytes:
    content = io.BytesIO()
    np.savez(content, np.arange(3))
    return content.getvalue()


@pytest.mark.parametrize("content", [pickled_array(), zipped_arrays(), b"\x80\x04K\x01.", b""])
def test_members_that_are_not_plain_arrays_are_refused_without_unpickling(content, tmp_path, monkeypatch):
    members = shards._members
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_members", lambda chunk: members(chunk) | {"action": content})
        manifest = write_data_set(tmp_path, make_chunk([3, 4]))
    with pytest.raises(DataError, match="is not a tar of plain NumPy arrays"):
        read(tmp_path, manifest)


def test_bytes_that_are_no_tar_are_refused_although_the_checksum_is_right(data):
    path, manifest = data
    record = replace(manifest.chunks[0], start=100)
    content = (path / record.shard).read_bytes()[100 : record.stop]
    record = replace(record, sha256=shards.hashlib.sha256(content).hexdigest())
    with pytest.raises(DataError, match="is not a tar of plain NumPy arrays"):
        read_chunk(Storage(path), record)


def config(path: Path, **options) -> DataConfig:
    return DataConfig(path=str(path), tokens_per_step=64, num_streams=2, **options)


def test_training_ends_with_the_name_of_a_bad_chunk(data):
    path, manifest = data
    damage(path, manifest, 1)
    stream = TrainStream(config(path), seed=0, rank=0, world_size=1)
    with pytest.raises(DataError, match=r"shard shards/part-00000-00000.tar.*checksum"):
        list(stream.batches(0))


def test_skipping_counts_and_logs_a_bad_chunk_once_and_serves_all_other_users(data, caplog):
    path, manifest = data
    damage(path, manifest, 1)
    stream = TrainStream(config(path, on_bad_shard="skip"), seed=0, rank=0, world_size=1)
    with caplog.at_level(logging.WARNING):
        served = [
            user for epoch in range(2) for batch in stream.batches(epoch) for user in batch.user_ids.tolist()
        ]
    chunk = make_chunk(random_lengths(64))
    expected = [user for user in range(64) if chunk.train_end[user] >= 2 and not 16 <= user < 32]
    assert sorted(served) == sorted(expected * 2)
    assert stream.counters["chunks_skipped"] == 1
    assert stream.counters["users_in_skipped_chunks"] == 16
    (message,) = caplog.messages
    assert message.startswith("Skipped 16 users of a bad chunk: chunk at bytes")


def test_a_chunk_that_turns_bad_between_two_runs_does_not_move_the_position(data):
    path, manifest = data
    options = config(path, on_bad_shard="skip")
    batches = list(TrainStream(options, seed=0, rank=0, world_size=1).batches(0))
    half = len(batches) // 2
    before = [user for batch in batches[:half] for user in batch.user_ids.tolist()]
    damage(path, manifest, 3)
    resumed = TrainStream(options, seed=0, rank=0, world_size=1).batches(0, batches[half - 1].position)
    after = [user for batch in resumed for user in batch.user_ids.tolist()]
    expected = [user for batch in batches[half:] for user in batch.user_ids.tolist() if user < 48]
    assert sorted(after) == sorted(expected)
    assert not set(before) & set(after)


def test_an_epoch_in_which_every_chunk_is_bad_is_an_error_even_when_skipping(data):
    path, manifest = data
    for record in manifest.chunks:
        (path / record.shard).unlink(missing_ok=True)
    stream = TrainStream(config(path, on_bad_shard="skip"), seed=0, rank=0, world_size=1)
    assert not list(stream.batches(0))
    with pytest.raises(DataError, match=r"all chunks with training users are bad in .*copy the shards again"):
        stream.check_epoch(stream.epoch_totals)


def test_evaluation_skips_and_counts_too(data):
    path, manifest = data
    damage(path, manifest, 0)
    stream = EvaluationStream(
        config(path, on_bad_shard="skip"), split="serve", rank=0, world_size=1, users_per_batch=32
    )
    users = [user for batch in stream.batches() for user in batch.user_ids.tolist()]
    assert min(users) >= 16
    assert stream.counters["chunks_skipped"] == 1
