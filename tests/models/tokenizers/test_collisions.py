from itertools import permutations

import numpy as np
import pytest

from cluster.errors import ConfigError
from models.tokenizers.collisions import number_in_group, spread
from models.tokenizers.tokenizer import greedy_codes, path_points


def cost(points: np.ndarray, codes: np.ndarray, code_vectors: list[np.ndarray]) -> float:
    return float(np.square(points - path_points(codes, code_vectors)).sum())


def test_items_of_a_path_are_numbered_in_their_order():
    codes = np.array([[1, 2], [0, 0], [1, 2], [1, 2], [0, 1]], dtype=np.int32)
    assert number_in_group(codes).tolist() == [0, 0, 1, 2, 0]


def test_numbers_that_old_items_have_are_not_given_again():
    taken = np.array([[1, 2, 0], [1, 2, 2], [4, 4, 0]], dtype=np.int32)
    codes = np.array([[1, 2], [4, 4], [1, 2], [9, 9]], dtype=np.int32)
    assert number_in_group(codes, taken).tolist() == [1, 1, 3, 0]


def test_items_under_one_prefix_share_its_last_codes_at_the_least_cost():
    random = np.random.default_rng(0)
    code_vectors = [10 * np.eye(2, 3, dtype=np.float32), random.normal(size=(4, 3)).astype(np.float32)]
    residuals = random.normal(size=(3, 3)).astype(np.float32) * 0.1
    points = np.concatenate([code_vectors[0][[0]] + residuals, code_vectors[0][[1]]])
    codes = np.array([[0, 2], [0, 2], [0, 2], [1, 3]], dtype=np.int32)
    found = spread(points, codes, code_vectors)
    best = min(
        cost(points[:3], np.column_stack([np.zeros(3, int), chosen]), code_vectors)
        for chosen in permutations(range(4), 3)
    )
    assert cost(points[:3], found[:3], code_vectors) == pytest.approx(best, rel=1e-5)
    assert found[3].tolist() == [1, 3], "a path without collision is left alone"
    assert len(np.unique(found, axis=0)) == 4


def test_a_prefix_with_more_items_than_paths_sends_some_to_others():
    random = np.random.default_rng(1)
    code_vectors = [random.normal(size=(3, 2)).astype(np.float32) for _ in range(3)]
    points = np.repeat(path_points(np.array([[0, 0, 0]]), code_vectors), 27, axis=0)
    points += 0.01 * random.normal(size=points.shape).astype(np.float32)
    codes = greedy_codes(points, code_vectors)
    found = spread(points, codes, code_vectors)
    assert len(np.unique(found, axis=0)) == 27, "all 3 x 3 x 3 paths are used once"
    twice = spread(np.repeat(points, 2, axis=0), np.repeat(codes, 2, axis=0), code_vectors, path_capacity=2)
    assert set(np.unique(twice, axis=0, return_counts=True)[1]) == {2}


def test_old_paths_stay_free_of_new_items():
    random = np.random.default_rng(2)
    code_vectors = [random.normal(size=(4, 2)).astype(np.float32) for _ in range(2)]
    points = random.normal(size=(16, 2)).astype(np.float32)
    old = spread(points[:10], greedy_codes(points[:10], code_vectors), code_vectors)
    new = spread(points[10:], greedy_codes(points[10:], code_vectors), code_vectors, taken=old)
    assert len(np.unique(np.concatenate([old, new]), axis=0)) == 16
    # Old items may share a path; what is full already takes nobody.
    crowded = np.zeros((3, 2), dtype=np.int32)
    new = spread(points[:13], greedy_codes(points[:13], code_vectors), code_vectors, taken=crowded)
    assert len(np.unique(new, axis=0)) == 13 and not (new == 0).all(axis=1).any()


def test_at_the_last_level_the_whole_distance_counts_and_not_the_nearest_pair():
    # The nearer one would keep the code at 0 and send the farther one away for far more.
    points, centroids = np.array([[1.0], [-2.0]], np.float32), np.array([[0.0], [2.4]], np.float32)
    assert spread(points, np.zeros((2, 1), np.int32), [centroids]).tolist() == [[1], [0]]


def test_more_items_than_paths_are_refused():
    code_vectors = [np.zeros((2, 1), dtype=np.float32)] * 2
    with pytest.raises(ConfigError, match="2 x 2 codes give 4 places, too few for 5 items"):
        spread(np.zeros((5, 1), np.float32), np.zeros((5, 2), np.int32), code_vectors)
