"""The shard format on its own: what is written is what is read."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from cluster.errors import DataError
from cluster.storage import Storage
from data_streams.manifest import Manifest
from data_streams.shards import Chunk, ShardWriter, read_chunk
from tests.data_streams.tiny_data import make_chunk, random_lengths, write_data_set


def assert_equal_chunks(one: Chunk, other: Chunk) -> None:
    for name in ("users", "offsets", "train_end", "valid_at", "test_at", "items"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert one.columns.keys() == other.columns.keys()
    for name, column in one.columns.items():
        assert column.dtype == other.columns[name].dtype
        np.testing.assert_array_equal(column, other.columns[name])


def test_chunks_come_back_as_they_were_written(tmp_path):
    chunk = make_chunk(random_lengths(100))
    manifest = write_data_set(tmp_path, chunk, chunk_users=16, chunks_per_shard=3)
    assert [record.num_users for record in manifest.chunks] == [16] * 6 + [4]
    assert len({record.shard for record in manifest.chunks}) == 3
    for index, record in enumerate(manifest.chunks):
        start = index * 16
        expected = chunk.select(start, start + record.num_users)
        assert_equal_chunks(read_chunk(Storage(tmp_path), record, manifest=manifest), expected)


def test_records_count_training_users_and_tokens(tmp_path):
    record = write_data_set(tmp_path, make_chunk([0, 1, 2, 3, 10])).chunks[0]
    assert (record.num_users, record.num_events) == (5, 16)
    # Training spans are 0, 1, 2, 1 and 8 events long.
    assert (record.num_train_users, record.train_tokens) == (2, 1 + 7)
    assert record.train_tokens_by_cut == (1 + 1, 1 + 2, 1 + 4, 1 + 7)
    assert [record.tokens_cut_to(length) for length in (1, 2, 3, 4, 8, 100)] == [2, 3, 4, 5, 8, 8]


def test_only_the_named_columns_and_the_times_are_kept(tmp_path):
    manifest = write_data_set(tmp_path, make_chunk([3, 4]))
    assert read_chunk(Storage(tmp_path), manifest.chunks[0], columns=()).columns.keys() == {"timestamp_s"}


def test_a_column_the_shard_lacks_is_named(tmp_path):
    manifest = write_data_set(tmp_path, make_chunk([3, 4]))
    with pytest.raises(DataError, match="lacks the arrays price"):
        read_chunk(Storage(tmp_path), manifest.chunks[0], columns=("price",))


def test_shards_are_plain_tars_that_a_webdataset_can_read(tmp_path):
    import webdataset

    chunk = make_chunk([3, 4, 5])
    write_data_set(tmp_path, chunk, chunk_users=2)
    shard = str(tmp_path / "shards/part-00000-00000.tar")
    samples = list(webdataset.WebDataset(shard, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["00000-0000000", "00000-0000001"]
    assert {"item.npy", "offsets.npy", "timestamp_s.npy"} <= samples[0].keys()


def test_the_bytes_of_a_shard_depend_on_its_content_only(tmp_path):
    chunk = make_chunk(random_lengths(20))
    records = [write_data_set(tmp_path / name, chunk).chunks for name in "ab"]
    assert records[0] == records[1]


def test_a_data_set_can_live_in_another_filesystem():
    storage = Storage("memory://tiny-shards")
    writer = ShardWriter(storage, 3)
    chunk = make_chunk([3, 4])
    writer.write(chunk)
    (record,) = writer.close()
    assert record.shard == "shards/part-00003-00000.tar"
    assert_equal_chunks(read_chunk(storage, record), chunk)


def test_a_manifest_comes_back_as_it_was_saved(tmp_path):
    manifest = write_data_set(tmp_path, make_chunk(random_lengths(40)), counters={"unknown_items": 3})
    assert Manifest.load(Storage(tmp_path)) == manifest


def test_the_fingerprint_follows_the_content(tmp_path):
    one = write_data_set(tmp_path / "a", make_chunk([3, 4], seed=0))
    other = write_data_set(tmp_path / "b", make_chunk([3, 4], seed=1))
    assert one.fingerprint() != other.fingerprint()
    assert one.fingerprint() == Manifest.load(Storage(tmp_path / "a")).fingerprint()


def test_a_missing_manifest_says_how_to_make_a_data_set(tmp_path):
    with pytest.raises(
        DataError, match=r"holds no manifest.json.*did not finish; make one with `grail data build`"
    ):
        Manifest.load(Storage(tmp_path))
    (tmp_path / "events.csv").write_text("user_id,item_id")
    with pytest.raises(DataError, match=r"events.csv holds no manifest.json: it is not a data set"):
        Manifest.load(Storage(tmp_path / "events.csv"))


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "must hold a JSON object")])
def test_a_damaged_manifest_is_named(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=f"manifest.json {message}"):
        Manifest.load(Storage(tmp_path))


def test_an_unknown_schema_version_says_which_are_known(tmp_path):
    write_data_set(tmp_path, make_chunk([3]), schema_version=7)
    with pytest.raises(
        DataError, match="has schema version 7, but this program reads 1; build the shards again"
    ):
        Manifest.load(Storage(tmp_path))


def test_missing_and_unknown_keys_of_a_manifest_are_named(tmp_path):
    content = asdict(write_data_set(tmp_path, make_chunk([3])))
    del content["num_items"]
    content["flavour"] = "sour"
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="missing: num_items; unknown: flavour"):
        Manifest.load(Storage(tmp_path))


def test_a_chunk_record_without_checksum_is_refused(tmp_path):
    content = asdict(write_data_set(tmp_path, make_chunk([3])))
    del content["chunks"][0]["sha256"]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"a chunk of .*manifest.json .*missing: sha256"):
        Manifest.load(Storage(tmp_path))
