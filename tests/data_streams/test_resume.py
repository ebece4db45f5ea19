"""A stream goes on exactly where the last counted step left it, at the same or another number of ranks."""

import json
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from data_streams import canonical
from data_streams.configuration import DataConfig
from data_streams.stream import TrainStream, merge_positions
from tests.data_streams.tiny_data import make_chunk, random_lengths, users_by_step, write_data_set


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    path: Path = tmp_path_factory.mktemp("data")
    write_data_set(path, make_chunk(random_lengths(400)), chunk_users=8)
    return DataConfig(path=str(path), max_length=12, tokens_per_step=100, num_streams=6, shuffle_chunks=3)


def open_streams(config: DataConfig, world_size: int, seed: int = 5) -> list[TrainStream]:
    return [TrainStream(config, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)]


def run(config: DataConfig, world_size: int, *, epoch: int = 0, position=None) -> dict[int, list]:
    streams = open_streams(config, world_size)
    return {rank: list(stream.batches(epoch, position)) for rank, stream in enumerate(streams)}


def position_after(batches: dict[int, list], steps: int) -> dict:
    """As a checkpoint keeps it: through JSON, merged over ranks that may have run out before."""
    last = [own[min(steps, len(own)) - 1].position for own in batches.values()]
    return json.loads(json.dumps(merge_positions(last)))


@pytest.mark.parametrize("steps", [1, 7, 20, -2, -1])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 3), (3, 2)])
def test_the_resumed_epoch_equals_the_uninterrupted_one(config, before, after, steps):
    whole = users_by_step(run(config, 1))
    steps %= len(whole) + 1
    position = position_after(run(config, before), steps)
    assert position["step"] == steps
    resumed = run(config, after, position=position)
    assert (users_by_step(resumed) if any(resumed.values()) else []) == whole[steps:]


def test_resumed_batches_are_equal_to_the_last_token_and_position(config):
    (whole,) = run(config, 1).values()
    (resumed,) = run(config, 1, position=whole[9].position).values()
    assert len(resumed) == len(whole) - 10
    for one, other in zip(resumed, whole[10:], strict=True):
        assert one.items.values.tolist() == other.items.values.tolist()
        assert one.items.offsets.tolist() == other.items.offsets.tolist()
        assert one.targets.tolist() == other.targets.tolist()
        assert one.position == other.position


def test_a_run_interrupted_again_and_again_loses_and_repeats_nobody(config):
    whole = users_by_step(run(config, 1))
    served, position = [], None
    for world_size in (2, 1, 3, 2, 6, 1) * 10:
        batches = run(config, world_size, position=position)
        if not any(batches.values()):
            break
        part = users_by_step(batches)[:5]
        served += part
        # A rank that has run out gives nothing: its streams keep the entries they had.
        ended = [position] if position else []
        last = [own[min(len(part), len(own)) - 1].position for own in batches.values() if own]
        position = merge_positions([*ended, *last])
    assert served == whole


def test_groups_that_are_done_with_are_not_read_again(config, monkeypatch):
    (whole,) = run(config, 1).values()
    position = whole[-2].position
    reads = []
    read_chunk = canonical.read_chunk
    monkeypatch.setattr(
        canonical, "read_chunk", lambda *args, **named: (reads.append(args[1]), read_chunk(*args, **named))[1]
    )
    run(config, 1, position=position)
    assert len(reads) <= config.num_streams * config.shuffle_chunks
    assert len(reads) < len(open_streams(config, 1)[0].manifest.chunks) / 2


def test_the_position_of_a_later_epoch_resumes_that_epoch(config):
    (whole,) = run(config, 1, epoch=3).values()
    (resumed,) = run(config, 1, epoch=3, position=whole[4].position).values()
    assert users_by_step({0: resumed}) == users_by_step({0: whole[5:]})


def test_a_rank_that_never_had_a_batch_still_has_a_position(tmp_path):
    write_data_set(tmp_path, make_chunk([9]))
    config = DataConfig(path=str(tmp_path), num_streams=2, tokens_per_step=4)
    streams = open_streams(config, 2)
    batches = [list(stream.batches(0)) for stream in streams]
    assert sorted(map(len, batches)) == [0, 1]
    last = [
        own[-1].position if own else stream.own_position(0, None)
        for own, stream in zip(batches, streams, strict=True)
    ]
    assert list(open_streams(config, 1)[0].batches(0, merge_positions(last))) == []


def test_a_rank_takes_its_own_part_of_a_merged_position(config):
    merged = position_after(run(config, 2), 4)
    own = [stream.own_position(0, merged) for stream in open_streams(config, 3)]
    assert [list(position["streams"]) for position in own] == [["0", "3"], ["1", "4"], ["2", "5"]]
    assert merge_positions(own) == merged


def test_an_option_that_an_older_version_did_not_know_is_passed_over(config):
    (whole,) = run(config, 1).values()
    position = json.loads(json.dumps(whole[3].position))
    del position["order"]["data.max_length"]
    (stream,) = open_streams(config, 1)
    assert next(iter(stream.batches(0, position))).user_ids.equal(whole[4].user_ids)


def test_a_position_taken_with_other_options_is_refused_and_says_which(config):
    (whole,) = run(config, 1).values()
    position = json.loads(json.dumps(whole[3].position))
    position["order"] |= {"data.max_length": 99, "seed": 4}
    with pytest.raises(
        ConfigError,
        match=r"data.max_length was 99, is 12; seed was 4, is 5; put the options back, or start again",
    ):
        next(open_streams(config, 1)[0].batches(0, position))


def test_a_position_taken_on_other_data_is_refused(config, tmp_path):
    (whole,) = run(config, 1).values()
    write_data_set(tmp_path, make_chunk(random_lengths(400), seed=1), chunk_users=8)
    other = DataConfig(**{**vars(config), "path": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"the content of data.path was"):
        next(open_streams(other, 1)[0].batches(0, whole[3].position))


def test_a_position_of_one_rank_alone_or_of_another_epoch_is_refused(config):
    batches = run(config, 2)
    with pytest.raises(ConfigError, match=r"must be of epoch 0 and hold all 6 streams.* lacks \[1, 3, 5\]"):
        next(open_streams(config, 1)[0].batches(0, batches[0][2].position))
    with pytest.raises(ConfigError, match=r"must be of epoch 1 .* is of epoch 0"):
        next(open_streams(config, 1)[0].batches(1, position_after(batches, 3)))
