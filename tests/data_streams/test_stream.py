"""What training and evaluation read: the right events of the right users, equal at every number of ranks."""

import logging
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError, DataError
from data_streams.batch import SequenceBatch
from data_streams.configuration import DataConfig
from data_streams.evaluation_stream import EvaluationStream
from data_streams.shards import Chunk
from data_streams.stream import TrainStream
from tests.data_streams.tiny_data import (
    make_chunk,
    random_lengths,
    user_events,
    users_by_step,
    write_data_set,
)
from trainer.configuration import EvaluationConfig

NUM_USERS = 300
MAX_LENGTH = 12


@pytest.fixture(scope="module")
def chunk() -> Chunk:
    return make_chunk(random_lengths(NUM_USERS))


@pytest.fixture(scope="module")
def path(tmp_path_factory, chunk) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data_set(folder, chunk)
    return folder


def make_config(path: Path, **options) -> DataConfig:
    chosen = {
        "max_length": MAX_LENGTH,
        "tokens_per_step": 128,
        "num_streams": 4,
        "shuffle_chunks": 2,
    } | options
    return DataConfig(path=str(path), **chosen)


def train_batches(
    config: DataConfig, *, epoch: int = 0, seed: int = 0, world_size: int = 1
) -> dict[int, list]:
    streams = [TrainStream(config, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)]
    return {rank: list(stream.batches(epoch)) for rank, stream in enumerate(streams)}


def served_users(batches: list[SequenceBatch]) -> list[int]:
    return [user for batch in batches for user in batch.user_ids.tolist()]


def row(jagged, index: int) -> list[int]:
    return jagged.values[jagged.offsets[index] : jagged.offsets[index + 1]].tolist()


def test_an_epoch_serves_every_training_user_exactly_once(path, chunk):
    served = served_users(train_batches(make_config(path))[0])
    assert sorted(served) == np.flatnonzero(chunk.train_end >= 2).tolist()


def test_inputs_are_the_latest_training_events_and_targets_the_events_after_them(path, chunk):
    for batch in train_batches(make_config(path, columns=("action", "timestamp_s")))[0]:
        for index, user in enumerate(batch.user_ids.tolist()):
            events = slice(batch.items.offsets[index], batch.items.offsets[index + 1])
            span = slice(max(chunk.train_end[user] - MAX_LENGTH - 1, 0), chunk.train_end[user])
            assert batch.items.values[events].tolist() == user_events(chunk, user)[span][:-1].tolist()
            assert batch.targets[events].tolist() == user_events(chunk, user)[span][1:].tolist()
            for name in ("action", "timestamp_s"):
                expected = user_events(chunk, user, name)[span]
                assert batch.features[name][events].tolist() == expected[:-1].tolist()
                assert batch.target_features[name][events].tolist() == expected[1:].tolist()


def test_batches_have_the_types_and_shapes_of_the_contract(path):
    batch = train_batches(make_config(path, columns=("action",)))[0][0]
    assert batch.user_ids.dtype == batch.items.values.dtype == batch.targets.dtype == torch.int64
    assert batch.items.offsets.dtype == torch.int64
    assert batch.features["action"].dtype == batch.target_features["action"].dtype == torch.int8
    assert batch.items.max_length == int(batch.items.lengths.max()) <= MAX_LENGTH
    assert batch.items.num_rows == batch.num_users
    assert batch.held_out is None and batch.seen is None


def test_steps_keep_the_token_budget(path):
    batches = train_batches(make_config(path))[0]
    # Streams differ a little in length, so the last steps are served by some of them only.
    total = np.cumsum([batch.num_tokens for batch in batches])[:-3]
    due = 128 * np.arange(1, len(total) + 1)
    # Each of the four streams is at most one user ahead of the clock, and never behind it.
    assert (total >= due).all()
    assert (total < due + 4 * MAX_LENGTH).all()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_users_of_a_step_are_the_same_at_every_number_of_ranks(path, world_size):
    config = make_config(path)
    alone = users_by_step(train_batches(config))
    assert users_by_step(train_batches(config, world_size=world_size)) == alone


def test_streams_lie_in_ascending_order_within_a_batch(path):
    config = make_config(path)
    alone = train_batches(config)[0][0].user_ids.tolist()
    per_stream = [own[0].user_ids.tolist() for own in train_batches(config, world_size=4).values()]
    assert alone == [user for users in per_stream for user in users]


def test_the_order_follows_from_the_seed_and_differs_by_epoch(path):
    config = make_config(path)
    first = served_users(train_batches(config)[0])
    assert served_users(train_batches(config)[0]) == first
    assert served_users(train_batches(config, epoch=1)[0]) != first
    assert served_users(train_batches(config, seed=1)[0]) != first


def test_the_users_inside_a_group_are_shuffled_anew_in_each_group_epoch_and_stream(tmp_path):
    write_data_set(tmp_path, make_chunk([6] * 80), chunk_users=20)
    orders = []
    for epoch in range(2):
        for own in train_batches(
            make_config(tmp_path, num_streams=2, shuffle_chunks=1), epoch=epoch, world_size=2
        ).values():
            places = [user % 20 for user in served_users(own)]
            orders += [tuple(places[:20]), tuple(places[20:])]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len(set(orders)) == 8


def test_users_of_neighbouring_chunks_are_mixed(path):
    config = make_config(path, num_streams=1, shuffle_chunks=4)
    first = served_users(train_batches(config)[0])[:40]
    assert len({user // 16 for user in first}) == 4


def test_streams_that_run_out_early_leave_batches_to_the_others(tmp_path):
    # One user fills a stream; the many short ones of the same weight last longer in the other.
    write_data_set(tmp_path, make_chunk([42] + [4] * 40), chunk_users=41)
    config = make_config(tmp_path, num_streams=2, tokens_per_step=4, max_length=1000)
    one, two = train_batches(config, world_size=2).values()
    assert len(one) != len(two)
    alone = train_batches(config)[0]
    assert len(alone) == max(len(one), len(two))
    assert any(batch.num_users == 0 for batch in one), "a long user uses up the budget of later steps"
    assert sorted(served_users(one + two)) == list(range(41))


def test_a_rank_without_any_user_has_no_batches(tmp_path):
    write_data_set(tmp_path, make_chunk([5]))
    batches = train_batches(make_config(tmp_path, num_streams=3), world_size=3)
    assert sorted(len(own) for own in batches.values()) == [0, 0, 1]


def test_an_empty_batch_looks_like_every_other(path):
    config = make_config(path, columns=("action", "timestamp_s"))
    stream = TrainStream(config, seed=0, rank=0, world_size=1)
    empty, full = stream.empty_batch(), next(stream.batches(0))
    assert (empty.num_users, empty.num_tokens, empty.items.max_length) == (0, 0, 0)
    assert empty.items.offsets.tolist() == [0]
    assert empty.targets.dtype == full.targets.dtype
    assert {name: value.dtype for name, value in empty.features.items()} == {
        name: value.dtype for name, value in full.features.items()
    }
    assert empty.target_features.keys() == full.target_features.keys()


def test_long_users_are_cut_counted_and_logged_once(path, chunk, caplog):
    with caplog.at_level(logging.INFO):
        stream = TrainStream(make_config(path), seed=0, rank=0, world_size=1)
        for epoch in range(2):
            assert max(batch.items.max_length for batch in stream.batches(epoch)) == MAX_LENGTH
    cut = int((chunk.train_end > MAX_LENGTH + 1).sum())
    assert stream.counters["users_cut"] == cut > 0
    assert stream.counters["users_empty"] == int((chunk.train_end == 0).sum()) > 0
    assert stream.counters["users_too_short"] == int((chunk.train_end == 1).sum()) > 0
    (message,) = caplog.messages
    assert message == (
        f"{cut} of {NUM_USERS} users have more than {MAX_LENGTH} training inputs (data.max-length); "
        "the oldest are left out"
    )


def test_the_expected_number_of_steps_is_close_and_equal_on_all_ranks(path):
    config = make_config(path)
    streams = [TrainStream(config, seed=0, rank=rank, world_size=3) for rank in range(3)]
    (expected,) = {stream.steps_per_epoch() for stream in streams}
    assert expected <= len(train_batches(config)[0]) <= expected + 3


def test_more_workers_than_streams_are_refused(path):
    with pytest.raises(ConfigError, match=r"4 streams cannot feed 5 workers; raise data.num-streams to 5"):
        TrainStream(make_config(path), seed=0, rank=0, world_size=5)


def test_a_missing_path_is_refused():
    with pytest.raises(ConfigError, match=r"data.path must name the folder of the shards"):
        TrainStream(DataConfig(), seed=0, rank=0, world_size=1)


@pytest.mark.parametrize(
    "option", ["max_length", "tokens_per_step", "num_streams", "shuffle_chunks", "prefetch_steps"]
)
def test_options_below_one_are_refused(path, option):
    with pytest.raises(ConfigError, match=f"data.{option.replace('_', '-')} must be at least 1, is 0"):
        TrainStream(make_config(path, **{option: 0}), seed=0, rank=0, world_size=0)


def test_a_lag_and_a_seed_below_zero_are_refused(path):
    with pytest.raises(ConfigError, match=r"data.feedback-lag-s must be at least 0, is -5.0"):
        TrainStream(make_config(path, feedback_lag_s=-5.0), seed=0, rank=0, world_size=1)
    with pytest.raises(ConfigError, match="seed must be at least 0, is -1"):
        TrainStream(make_config(path), seed=-1, rank=0, world_size=1)


def test_columns_the_shards_lack_are_refused_with_what_they_hold(path):
    with pytest.raises(ConfigError, match=r"needs the event columns price .* holds action, timestamp_s"):
        TrainStream(make_config(path, columns=("action", "price")), seed=0, rank=0, world_size=1)


def test_data_without_two_training_events_of_anyone_is_refused(tmp_path):
    write_data_set(tmp_path, make_chunk([0, 1, 3]))
    with pytest.raises(DataError, match=r"no user of .* has two training events"):
        TrainStream(make_config(tmp_path), seed=0, rank=0, world_size=1)


def evaluation_batches(
    config: DataConfig, split: str, *, world_size: int = 1, users_per_batch: int = 64, **chosen
):
    streams = [
        EvaluationStream(
            config,
            split=split,
            rank=rank,
            world_size=world_size,
            users_per_batch=users_per_batch,
            **chosen,
        )
        for rank in range(world_size)
    ]
    return {rank: list(stream.batches()) for rank, stream in enumerate(streams)}


@pytest.mark.parametrize("split", ["valid", "test", "serve"])
def test_evaluation_gives_the_history_before_the_held_out_event(path, chunk, split):
    ends = {"valid": chunk.valid_at, "test": chunk.test_at, "serve": chunk.lengths}[split]
    served = []
    for batch in evaluation_batches(make_config(path, columns=("action",)), split)[0]:
        assert batch.targets is None
        for index, user in enumerate(batch.user_ids.tolist()):
            past = user_events(chunk, user)[: ends[user]].tolist()
            assert row(batch.items, index) == past[-MAX_LENGTH:]
            assert row(batch.seen, index) == past
            actions = batch.items.with_values(batch.features["action"])
            assert (
                row(actions, index) == user_events(chunk, user, "action")[: ends[user]][-MAX_LENGTH:].tolist()
            )
            if split != "serve":
                assert int(batch.held_out[index]) == user_events(chunk, user)[ends[user]]
        assert (batch.held_out is None) == (split == "serve")
        served += batch.user_ids.tolist()
    assert served == np.flatnonzero(ends > 0).tolist()


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_evaluation_serves_every_user_once_over_all_ranks(path, world_size):
    alone = served_users(evaluation_batches(make_config(path), "test")[0])
    ranks = evaluation_batches(make_config(path), "test", world_size=world_size)
    assert [user for own in ranks.values() for user in served_users(own)] == alone
    sizes = [len(served_users(own)) for own in ranks.values()]
    assert max(sizes) - min(sizes) < 0.2 * len(alone)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_share_of_the_users_is_the_same_for_any_number_of_ranks(path, split):
    shared = partial(evaluation_batches, make_config(path), split, user_share=0.25)
    everyone = served_users(evaluation_batches(make_config(path), split)[0])
    drawn = served_users(shared()[0])
    assert set(drawn) < set(everyone) and 0.1 < len(drawn) / len(everyone) < 0.4
    assert [user for own in shared(world_size=3).values() for user in served_users(own)] == drawn
    larger = served_users(evaluation_batches(make_config(path), split, user_share=0.5)[0])
    assert set(drawn) < set(larger)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_users_whose_held_out_event_has_an_action_are_evaluated_by_themselves(tmp_path, chunk, split):
    ends, found = {"valid": chunk.valid_at, "test": chunk.test_at}[split], {}
    write_data_set(tmp_path, chunk, actions=["click", "like", "share", "view"])
    read = partial(evaluation_batches, make_config(tmp_path), split)
    for code, name in enumerate(("click", "like", "share", "view")):
        batches = read(held_out_action=name)
        found[name] = served_users(batches[0])
        assert all(user_events(chunk, user, "action")[ends[user]] == code for user in found[name])
    assert sorted(chain.from_iterable(found.values())) == served_users(read()[0])
    assert all(found.values())
    with pytest.raises(
        ConfigError, match=r"evaluation.held-out-action must be an action of the data, .* got none"
    ):
        read(held_out_action="none")


def test_recommendations_are_for_all_users_whatever_share_is_evaluated(path):
    whole = served_users(evaluation_batches(make_config(path), "serve")[0])
    assert served_users(evaluation_batches(make_config(path), "serve", user_share=0.1)[0]) == whole


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_of_no_users_or_more_than_all_is_refused(share):
    with pytest.raises(ConfigError, match=r"evaluation.user-share must be above 0 and at most 1"):
        EvaluationConfig(user_share=share)


def test_evaluation_batches_are_full_but_for_the_last(path):
    for own in evaluation_batches(make_config(path), "test", world_size=2, users_per_batch=50).values():
        sizes = [batch.num_users for batch in own]
        assert sizes[:-1] == [25] * (len(sizes) - 1)
        assert 0 < sizes[-1] <= 25


@pytest.mark.parametrize("split", ["valid", "test"])
def test_late_feedback_ends_the_history_some_time_before_the_held_out_event(path, chunk, split):
    lag_s, served = 3e8, []
    ends = {"valid": chunk.valid_at, "test": chunk.test_at}[split]
    stream_of = make_config(path, feedback_lag_s=lag_s)
    for batch in evaluation_batches(stream_of, split)[0]:
        for index, user in enumerate(batch.user_ids.tolist()):
            times = user_events(chunk, user, "timestamp_s")
            early = (times < times[ends[user]] - lag_s)[: ends[user]]
            past = user_events(chunk, user)[: ends[user]][early].tolist()
            assert row(batch.items, index) == past[-MAX_LENGTH:] and row(batch.seen, index) == past
            assert int(batch.held_out[index]) == user_events(chunk, user)[ends[user]]
            served.append(user)
    assert 0 < len(served) < int((ends > 0).sum())


def test_late_feedback_needs_times(tmp_path):
    chunk = make_chunk([6] * 4)
    del chunk.columns["timestamp_s"]
    write_data_set(tmp_path, chunk)
    with pytest.raises(ConfigError, match=r"feedback-lag-s needs events with timestamp_s, .* holds action"):
        evaluation_batches(make_config(tmp_path, feedback_lag_s=1.0), "test")


def test_users_whose_first_event_is_held_out_are_counted(tmp_path):
    chunk = make_chunk([2, 5])
    chunk.train_end[0], chunk.valid_at[0] = 0, 0
    write_data_set(tmp_path, chunk)
    stream = EvaluationStream(make_config(tmp_path), split="valid", rank=0, world_size=1, users_per_batch=8)
    for _ in range(2):
        assert served_users(list(stream.batches())) == [1]
        assert stream.counters["users_without_history"] == 1


def test_an_empty_evaluation_batch_looks_like_every_other(path):
    stream = EvaluationStream(
        make_config(path, columns=("action",)), split="test", rank=0, world_size=1, users_per_batch=64
    )
    empty, full = stream.empty_batch(), next(stream.batches())
    assert (empty.num_users, empty.num_tokens, empty.seen.num_rows) == (0, 0, 0)
    for one, other in ((empty.held_out, full.held_out), (empty.seen.values, full.seen.values)):
        assert one.dtype == other.dtype == torch.int64
    assert empty.features["action"].dtype == full.features["action"].dtype
