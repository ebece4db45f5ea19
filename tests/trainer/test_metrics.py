"""Metrics against plain loops and numbers computed by hand."""

import math

import numpy as np
import polars as pl
import pytest

from trainer.metrics import (
    bootstrap_intervals,
    category_vectors,
    coverage_at,
    diversity_at,
    head_items,
    ndcg_at,
    novelty_at,
    recall_at,
    reciprocal_rank,
    share_met_at,
    unit_vectors,
)

NUM_ITEMS = 30


@pytest.fixture
def lists() -> np.ndarray:
    """Lists of ten distinct items; some are shorter, one is empty."""
    random = np.random.default_rng(0)
    lists = np.stack([random.permutation(NUM_ITEMS)[:10] for _ in range(40)])
    lists[3, 6:], lists[4, 1:], lists[5] = -1, -1, -1
    return lists


def filled(row: np.ndarray, k: int) -> list[int]:
    return [int(item) for item in row[:k] if item >= 0]


def test_rank_metrics_are_those_of_a_single_relevant_item():
    ranks = np.array([1, 2, 5, 5.5, 6, 100], dtype=np.float32)
    assert recall_at(ranks, 5).tolist() == [1, 1, 1, 0, 0, 0]
    np.testing.assert_allclose(ndcg_at(ranks, 5), [1, 1 / math.log2(3), 1 / math.log2(6), 0, 0, 0])
    np.testing.assert_allclose(ndcg_at(ranks, 10)[3:5], [1 / math.log2(6.5), 1 / math.log2(7)])
    np.testing.assert_allclose(reciprocal_rank(ranks), [1, 1 / 2, 1 / 5, 1 / 5.5, 1 / 6, 1 / 100])


@pytest.mark.parametrize("k", [1, 5, 10])
def test_list_metrics_equal_plain_loops(lists, k):
    random = np.random.default_rng(1)
    counts = random.integers(0, 50, NUM_ITEMS)
    vectors = unit_vectors(random.normal(size=(NUM_ITEMS, 8)).astype(np.float16))
    novelty, diversity = novelty_at(lists, k, counts), diversity_at(lists, k, vectors)
    for user, row in enumerate(lists):
        items = filled(row, k)
        information = [-math.log2(max(counts[item], 1) / counts.sum()) for item in items]
        assert novelty[user] == pytest.approx(np.mean(information) if items else 0)
        cosines = [vectors[a] @ vectors[b] for i, a in enumerate(items) for b in items[:i]]
        assert diversity[user] == pytest.approx(1 - np.mean(cosines) if cosines else 0, abs=1e-5)
    shown = {item for row in lists for item in filled(row, k)}
    assert coverage_at(lists, k, NUM_ITEMS) == pytest.approx(len(shown) / NUM_ITEMS)


def test_the_head_is_the_fifth_of_the_items_with_most_events():
    counts = np.array([3, 9, 1, 9, 0, 2, 9, 0, 0, 0])
    assert head_items(counts).nonzero()[0].tolist() == [1, 3]
    assert head_items(counts[:6]).nonzero()[0].tolist() == [1, 3], "a fifth of six is more than one"
    lists = np.array([[1, 6, 3], [3, -1, -1], [4, 2, 0]])
    in_head = head_items(counts)[np.maximum(lists, 0)] & (lists >= 0)
    assert share_met_at(lists, in_head, 2).tolist() == [0.5, 1.0, 0.0]


def test_categories_stand_in_for_vectors():
    categories = pl.Series([["hair", "care"], ["hair"], [], ["nails"], ["hair", "hair"], None])
    vectors = category_vectors(categories)
    lists = np.array([[0, 1], [1, 4], [1, 3], [2, 5]])
    np.testing.assert_allclose(diversity_at(lists, 2, vectors), [1 - 1 / math.sqrt(2), 0, 1, 1], atol=1e-6)
    one_each = category_vectors(pl.Series(["hair", "hair", "nails"]))
    np.testing.assert_allclose(diversity_at(np.array([[0, 1], [0, 2]]), 2, one_each), [0, 1], atol=1e-6)


def test_items_without_any_category_differ_from_all_others():
    vectors = category_vectors(pl.Series([[], []], dtype=pl.List(pl.String)))
    assert diversity_at(np.array([[0, 1]]), 2, vectors).tolist() == [1]


def test_bootstrap_intervals_have_the_width_of_the_normal_approximation():
    random = np.random.default_rng(2)
    per_user = {"rare": (random.random(5000) < 0.1).astype(float), "smooth": random.normal(3, 2, 5000)}
    intervals = bootstrap_intervals(per_user, resamples=1000, seed=1)
    for name, values in per_user.items():
        low, high = intervals[name]
        width = 2 * 1.96 * values.std() / math.sqrt(len(values))
        assert low < values.mean() < high
        assert high - low == pytest.approx(width, rel=0.1)


def test_bootstrap_intervals_cover_the_true_mean_about_nineteen_times_in_twenty():
    random = np.random.default_rng(3)
    samples = {str(i): values for i, values in enumerate((random.random((200, 300)) < 0.3).astype(float))}
    intervals = bootstrap_intervals(samples, resamples=400)
    covered = np.mean([low <= 0.3 <= high for low, high in intervals.values()])
    assert 0.89 <= covered <= 0.99


def test_bootstrap_depends_on_the_seed_alone():
    per_user = {"x": np.arange(50.0)}
    first = bootstrap_intervals(per_user, resamples=100, seed=1)
    assert first == bootstrap_intervals(per_user, resamples=100, seed=1)
    assert first != bootstrap_intervals(per_user, resamples=100, seed=2)
