import numpy as np
import pytest

from models.tokenizers import capacity
from models.tokenizers.balanced_kmeans import BalancedKMeans, _assign
from models.tokenizers.capacity import assign_within_capacity, rank_in_group
from models.tokenizers.clustering import squared_distances
from tests.models.tokenizers.clustered import clustered_vectors


def greedy_by_pairs(points: np.ndarray, centroids: np.ndarray, capacities: np.ndarray) -> np.ndarray:
    """All pairs by growing distance, then point, each taken where both have room."""
    distances, left = squared_distances(points, centroids), capacities.copy()
    pairs = sorted(np.ndindex(distances.shape), key=lambda pair: (distances[pair], pair))
    held = np.full(len(points), -1)
    for point, centroid in pairs:
        if held[point] < 0 and left[centroid]:
            held[point] = centroid
            left[centroid] -= 1
    return held


@pytest.mark.parametrize("seed", range(12))
def test_assignment_equals_taking_all_pairs_by_growing_distance(seed, monkeypatch):
    monkeypatch.setattr(capacity, "CANDIDATES", 3)
    random = np.random.default_rng(seed)
    num_points, num_centroids = random.integers(20, 120), random.integers(2, 15)
    points = random.normal(size=(num_points, 3)).astype(np.float32)
    # Centroids close together make everybody want the same ones.
    centroids = (random.choice([1.0, 0.05]) * random.normal(size=(num_centroids, 3))).astype(np.float32)
    capacities = random.multinomial(num_points + 5, np.full(num_centroids, 1 / num_centroids))
    expected = greedy_by_pairs(points, centroids, capacities)
    np.testing.assert_array_equal(assign_within_capacity(points, centroids, capacities), expected)


def test_of_equally_near_points_the_first_ones_stay():
    points = np.zeros((5, 1), dtype=np.float32)
    centroids = np.array([[1.0], [-3.0]], dtype=np.float32)
    assert assign_within_capacity(points, centroids, np.array([2, 3])).tolist() == [0, 0, 1, 1, 1]


def test_every_code_of_balanced_kmeans_has_equally_many_items_but_for_one():
    vectors = clustered_vectors(401)
    tokenizer = BalancedKMeans.Config(code_sizes=(8, 8, 4)).build(dim=12)
    tokenizer.fit(vectors)
    codes = tokenizer.assign(vectors)
    for level, size in enumerate((8, 8, 4)):
        counts = np.bincount(codes[:, level], minlength=size)
        assert sorted(counts) == sorted(
            [401 // size] * (size - 401 % size) + [401 // size + 1] * (401 % size)
        )


def test_ranks_start_again_with_each_group():
    assert rank_in_group(np.array([3, 3, 3, 7, 9, 9])).tolist() == [0, 1, 2, 0, 0, 1]
    assert rank_in_group(np.empty(0, dtype=np.int64)).tolist() == []


def test_the_code_that_most_items_are_nearest_to_has_the_one_that_is_left_over():
    points, centroids = np.array([[0.0], [0.1], [9.0]], np.float32), np.array([[9.0], [0.0]], np.float32)
    assert _assign(points, centroids).tolist() == [1, 1, 0]
