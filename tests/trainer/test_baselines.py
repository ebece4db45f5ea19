"""Popularity and item-to-item statistics on a small data set, against counts made by hand."""

import io
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from cluster.storage import Storage
from data_streams.batch import SequenceBatch
from data_streams.configuration import DataConfig
from data_streams.jagged import Jagged
from data_streams.manifest import Manifest
from data_streams.shards import Chunk, ShardWriter
from trainer.baselines import cooccurrence, evaluate_baselines, popularity, read_training_events, transitions
from trainer.configuration import EvaluationConfig

HISTORIES = [[0, 1, 2, 3, 4], [0, 1, 2, 5, 1], [5, 1, 2, 0, 3], [4, 0, 5, 1, 2]]
"""The last item of each user is the test, the last but one the validation."""
EXPOSED = (3, 0)
"""User 3 was only shown the first item, 4."""
NUM_ITEMS = 6
CONFIG = EvaluationConfig(cutoffs=(1, 3), bootstrap_resamples=20, users_per_batch=3)


@pytest.fixture
def data(tmp_path: Path) -> str:
    storage = Storage(tmp_path)
    actions = np.ones(20, dtype=np.int8)
    actions[EXPOSED[0] * 5 + EXPOSED[1]] = 0
    chunk = Chunk(
        users=np.arange(4),
        offsets=np.arange(0, 21, 5),
        train_end=np.full(4, 3, dtype=np.int32),
        valid_at=np.full(4, 3, dtype=np.int32),
        test_at=np.full(4, 4, dtype=np.int32),
        items=np.array(HISTORIES, dtype=np.int32).ravel(),
        columns={"action": actions},
    )
    writer = ShardWriter(storage, part=0, chunk_users=2)
    writer.write(chunk)
    buffer = io.BytesIO()
    pl.DataFrame({"item_id": range(NUM_ITEMS), "train_count": [3, 3, 3, 0, 0, 2]}).write_parquet(buffer)
    storage.write("items.parquet", buffer.getvalue())
    Manifest(
        source={},
        num_users=4,
        num_items=NUM_ITEMS,
        num_events=20,
        split={},
        columns={"action": "int8"},
        actions=["exposure", "click"],
        train_length_counts={3: 4},
        chunks=writer.close(),
    ).save(storage)
    return str(tmp_path)


def users_with(*histories: list[int]) -> SequenceBatch:
    lengths = torch.tensor([len(history) for history in histories])
    items = Jagged.from_lengths(torch.tensor(list(chain(*histories))), lengths)
    return SequenceBatch(user_ids=torch.arange(len(histories)), items=items)


def test_training_events_end_before_validation_and_leave_exposures_out(data):
    events = read_training_events(data)
    assert events.users.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert events.items.tolist() == [0, 1, 2, 0, 1, 2, 5, 1, 2, 0, 5]


def test_popularity_counts_training_events(data):
    scores = popularity(read_training_events(data))(users_with([3], [4, 1]))
    assert scores.tolist() == [[3, 3, 3, 0, 0, 2]] * 2


def test_transitions_are_shares_of_what_followed_and_the_last_item_weighs_most(data):
    score = transitions(read_training_events(data))
    torch.testing.assert_close(score(users_with([0])), torch.tensor([[0, 2 / 3, 0, 0, 0, 1 / 3]]))
    assert score(users_with([2])).tolist() == [[0] * NUM_ITEMS], "no item follows the last of a history"
    torch.testing.assert_close(score(users_with([0, 1])), torch.tensor([[0, 1 / 3, 1, 0, 0, 1 / 6]]))


def test_cooccurrence_is_a_cosine_summed_over_the_history(data):
    score = cooccurrence(read_training_events(data))
    # Items 0, 1, 2 and 5 stand in the histories of 3, 3, 3 and 2 users; 0 and 5 together in one.
    with_zero = [0, 2 / 3, 2 / 3, 0, 0, 1 / 6**0.5]
    with_five = [1 / 6**0.5, 1 / 6**0.5, 1 / 6**0.5, 0, 0, 0]
    torch.testing.assert_close(score(users_with([0], [5])), torch.tensor([with_zero, with_five]))
    both = torch.tensor([with_zero]) + torch.tensor([with_five])
    torch.testing.assert_close(score(users_with([0, 5])), both)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_baselines_and_the_oracle_are_ranked_like_models(data, split):
    held_out = torch.tensor([history[-2 if split == "valid" else -1] for history in HISTORIES])

    def oracle(batch: SequenceBatch) -> torch.Tensor:
        return torch.nn.functional.one_hot(held_out[batch.user_ids], NUM_ITEMS).float()

    results = evaluate_baselines(DataConfig(path=data), CONFIG, split=split, oracle=oracle)
    assert list(results) == ["popularity", "co-occurrence", "transitions", "oracle"]
    assert all((result.num_users, result.split) == (4, split) for result in results.values())
    assert results["oracle"].metrics["recall@1"] == 1


def test_popularity_ranks_of_users_are_those_counted_by_hand(data):
    filtered = evaluate_baselines(DataConfig(path=data), CONFIG, split="test")["popularity"]
    # Held out: 4 (5 is above it), 1 (seen; above 3 and 4), 3 (tied with 4), 2 (above 3).
    ranks = np.array([2, 1, 1.5, 1])
    assert filtered.metrics["mrr"] == pytest.approx((1 / ranks).mean())
    raw = EvaluationConfig(cutoffs=(1,), filter_seen=False, bootstrap_resamples=0)
    unfiltered = evaluate_baselines(DataConfig(path=data), raw, split="test")["popularity"]
    assert unfiltered.metrics["mrr"] == pytest.approx((1 / np.array([5.5, 2, 5.5, 2])).mean())
    assert not unfiltered.seen_filtered
    assert not unfiltered.intervals


def test_no_more_chunks_are_read_than_hold_the_users_that_are_wanted(data):
    # Chunks of two users, who all have two training events.
    users = [read_training_events(data, least_users=wanted).users for wanted in (1, 2, 3, 9)]
    assert [sorted(set(found.tolist())) for found in users] == [[0, 1], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]
