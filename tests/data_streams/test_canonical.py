"""The deal of an epoch and the budget clock."""

import numpy as np
import pytest

from data_streams.canonical import Deal, Piece, deal_epoch, generator
from data_streams.configuration import DataConfig
from data_streams.jagged import gather_ranges
from data_streams.token_budget import step_of_users, steps_per_epoch, tokens_per_epoch, training_tokens
from tests.data_streams.tiny_data import make_chunk, random_lengths, write_data_set


def dealt_users(deal: Deal, num_parts: int) -> list[tuple[int, int]]:
    pieces = [piece for part in range(num_parts) for piece in deal.pieces(part)]
    return [(piece.chunk, user) for piece in pieces for user in range(piece.start, piece.stop)]


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7, 40, 1000])
def test_every_user_is_dealt_exactly_once(num_parts):
    random = np.random.default_rng(num_parts)
    num_users = random.integers(1, 30, 20)
    weights = num_users * random.integers(1, 50, 20)
    deal = Deal(random.permutation(20), weights, num_users, num_parts)
    users = dealt_users(deal, num_parts)
    assert sorted(users) == [(chunk, user) for chunk in range(20) for user in range(num_users[chunk])]


def test_chunks_without_weight_are_not_dealt():
    deal = Deal(np.arange(3), np.array([4, 0, 4]), np.array([2, 9, 2]), 2)
    assert deal.pieces(0) == [Piece(chunk=0, start=0, stop=2)]
    assert deal.pieces(1) == [Piece(chunk=2, start=0, stop=2)]


def test_a_chunk_on_a_border_is_divided():
    deal = Deal(np.array([1, 0]), np.array([10, 20]), np.array([10, 10]), 2)
    assert deal.pieces(0) == [Piece(chunk=1, start=0, stop=7)]
    assert deal.pieces(1) == [Piece(chunk=1, start=7, stop=10), Piece(chunk=0, start=0, stop=10)]


def test_nothing_can_be_dealt_of_nothing():
    none = np.zeros(0, dtype=np.int64)
    assert Deal(none, none, none, 3).pieces(1) == []


def test_streams_are_nearly_equal_in_tokens_although_a_few_users_are_very_long(tmp_path):
    lengths = np.minimum(np.random.default_rng(0).pareto(1.0, 4000) * 5, 2000).astype(np.int64)
    chunk = make_chunk(lengths)
    config = DataConfig(path=str(tmp_path), num_streams=8, max_length=50)
    manifest = write_data_set(tmp_path, chunk, chunk_users=64)
    deal = deal_epoch(manifest, config, 0, 0)
    tokens = training_tokens(chunk.train_end, config.max_length)
    loads = [
        sum(
            tokens[piece.chunk * 64 + piece.start : piece.chunk * 64 + piece.stop].sum()
            for piece in deal.pieces(c)
        )
        for c in range(8)
    ]
    assert max(loads) / min(loads) < 1.05


def test_the_deal_follows_from_seed_and_epoch(tmp_path):
    manifest = write_data_set(tmp_path, make_chunk(random_lengths(200)))
    config = DataConfig(path=str(tmp_path), num_streams=2)
    first, again, epoch, seed = (
        deal_epoch(manifest, config, *place).pieces(0) for place in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert first == again
    assert first != epoch
    assert first != seed


def test_generators_of_other_purposes_and_places_differ():
    places = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 0, 1)]
    draws = [int(generator(*place).integers(2**60)) for place in places]
    assert len(set(draws)) == len(draws)
    assert int(generator(0, "a").integers(2**60)) == draws[0]


def test_training_tokens_are_all_events_but_the_last_and_at_most_the_maximum():
    assert training_tokens(np.array([0, 1, 2, 6, 7, 900]), 5).tolist() == [0, 0, 1, 5, 5, 5]


def test_the_budget_clock_splits_no_user_and_does_not_drift():
    config = DataConfig(tokens_per_step=20, num_streams=2)
    # Ten tokens a step: the long user begins in step 0 and uses up steps 1 and 2 as well.
    assert step_of_users(np.array([6, 30, 4, 1, 9, 1]), 0, config).tolist() == [0, 0, 3, 4, 4, 5]


def test_the_budget_clock_goes_on_where_it_was_left():
    config = DataConfig(tokens_per_step=100, num_streams=3)
    tokens = np.random.default_rng(0).integers(1, 60, 500)
    steps = step_of_users(tokens, 0, config)
    for cut in (1, 77, 499):
        np.testing.assert_array_equal(
            step_of_users(tokens[cut:], int(tokens[:cut].sum()), config), steps[cut:]
        )


def test_uneven_budgets_are_met_on_average():
    config = DataConfig(tokens_per_step=100, num_streams=3)
    steps = step_of_users(np.ones(10_000, dtype=np.int64), 0, config)
    assert np.bincount(steps)[:-1].min() == 33
    assert steps[-1] == 299


def test_steps_per_epoch_count_the_tokens_after_the_cut(tmp_path):
    manifest = write_data_set(tmp_path, make_chunk([0, 1, 2, 5, 30]))
    # Training spans of 0, 1, 2, 3 and 28 events.
    assert tokens_per_epoch(manifest, 50) == 1 + 2 + 27
    assert tokens_per_epoch(manifest, 10) == 1 + 2 + 10
    assert steps_per_epoch(manifest, DataConfig(tokens_per_step=4, max_length=10)) == 4


def test_ranges_are_gathered_one_after_another():
    assert gather_ranges(np.array([7, 0, 2]), np.array([2, 0, 3])).tolist() == [7, 8, 2, 3, 4]
    assert gather_ranges(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)).tolist() == []
