"""Trees over items: every item a leaf of its own, evenly filled, alike items near each other."""

import numpy as np
import pytest

from cluster.errors import ConfigError, DataError
from models.trees.categories import category_tree
from models.trees.clustering import cluster_tree
from models.trees.shape import codes_of_order, tree_depth
from tests.models.tokenizers.clustered import clustered_vectors


def sizes_of_prefixes(codes: np.ndarray, depth: int) -> np.ndarray:
    return np.unique(codes[:, :depth], axis=0, return_counts=True)[1]


@pytest.mark.parametrize("branching", [2, 4, 8])
@pytest.mark.parametrize("num_items", [9, 60, 97, 128])
def test_every_item_has_a_leaf_and_siblings_differ_by_one_item(num_items, branching):
    vectors = np.random.default_rng(0).normal(size=(num_items, 5))
    trees = [
        category_tree(np.arange(num_items) % 7 - 1, branching=branching, seed=0),
        cluster_tree(vectors, branching=branching),
    ]
    for codes in trees:
        assert codes.shape == (num_items, tree_depth(num_items, branching)) and codes.dtype == np.int32
        assert 0 <= codes.min() and codes.max() < branching
        for depth in range(1, codes.shape[1] + 1):
            sizes = sizes_of_prefixes(codes, depth)
            assert sizes.max() - sizes.min() <= 1
        assert sizes.max() == 1 and len(sizes) == num_items


def test_a_list_is_halved_again_and_again():
    codes = codes_of_order(np.array([2, 0, 1, 4, 3]), 2)
    assert codes[[2, 0, 1, 4, 3]].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 0, 0], [1, 1, 0]]


def test_a_tree_of_categories_has_them_side_by_side_in_an_order_of_the_seed():
    categories = np.repeat(np.arange(8), 4)[np.random.default_rng(1).permutation(32)]
    codes = category_tree(categories, branching=2, seed=0)
    for prefix in np.unique(codes[:, :3], axis=0):
        below = (codes[:, :3] == prefix).all(1)
        assert len(np.unique(categories[below])) == 1
    assert (codes != category_tree(categories, branching=2, seed=1)).any()
    np.testing.assert_array_equal(codes, category_tree(categories, branching=2, seed=0))


def test_clusters_far_apart_have_subtrees_of_their_own():
    random = np.random.default_rng(0)
    cluster = random.permutation(np.repeat(np.arange(16), 8))
    vectors = 5 * random.normal(size=(16, 6))[cluster] + 0.1 * random.normal(size=(128, 6))
    codes = cluster_tree(vectors, branching=2)
    found = codes[:, :4] @ (2 ** np.arange(4))
    assert len(np.unique(np.stack((found, cluster)), axis=1).T) == 16


def test_equal_vectors_are_split_evenly_too():
    codes = cluster_tree(np.zeros((20, 3)), branching=2)
    assert len(np.unique(codes, axis=0)) == 20


def test_what_cannot_have_a_tree_is_told():
    with pytest.raises(ConfigError, match=r"--branching must be a power of two, .* and it is 3; give 2, 4"):
        tree_depth(10, 3)
    with pytest.raises(
        DataError, match=r"more items than one node has children \(4\), and there are 4; lower"
    ):
        tree_depth(4, 4)
    vectors = clustered_vectors(20)
    vectors[3] = np.nan
    with pytest.raises(DataError, match="such as row 3; mend the matrix"):
        cluster_tree(vectors, branching=2)
