"""A tree re-learnt from item vectors: balanced 2-means of every node, from the root down.

All nodes of a depth are split together. Items lie in a list in which those of a node stand side by side, so that a
split is a new order within each node's segment: by how much nearer an item is to the second of two centroids than to
the first. For two clusters of given sizes that order cuts into the assignment of the least squared distance.

Source: Zhu et al., Learning Tree-based Deep Model for Recommender Systems (2018): recursive k-means with both halves
rebalanced to equal size. Deviation: Lloyd's rounds are balanced themselves, so that there is nothing to rebalance.

Shapes: N items, d width of vectors, S nodes of one depth.
"""

import numpy as np

from models.tokenizers.clustering import group_sums
from models.tokenizers.tokenizer import require_finite
from models.trees.shape import codes_of_order, even_leaves, tree_depth

ROUNDS = 10
"""Of assigning and moving centroids, at most, for each depth."""


def cluster_tree(vectors: np.ndarray, *, branching: int) -> np.ndarray:
    """Codes [N, D] int32 of vectors [N, d]; ties by item row, so that nothing is drawn.

    Cost: the vectors in fp32 twice, and per depth about ten passes over them.
    Raises: DataError naming rows that are not finite.
    """
    vectors = np.array(vectors, dtype=np.float32)
    require_finite(vectors, np.arange(len(vectors)))
    depth = tree_depth(len(vectors), branching)
    num_halvings = depth * (branching.bit_length() - 1)
    leaves = even_leaves(len(vectors), 2**num_halvings)
    order = np.arange(len(vectors))
    for halving in range(num_halvings):
        order = order[_split(vectors[order], leaves >> (num_halvings - halving - 1))]
    return codes_of_order(order, branching)


def _split(vectors: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """An order of the list in which each half of each node holds the items of one centroid.

    Shapes: vectors [N, d] in the order of the list, halves [N] int64 ascending: the number of each place's half, of
    which 2 v and 2 v + 1 are those of node v -> [N] places.
    """
    _, nodes = np.unique(halves >> 1, return_inverse=True)
    halves, num_nodes = 2 * nodes + (halves & 1), int(nodes[-1]) + 1
    ends, order = _far_apart(vectors, nodes), None
    for _ in range(ROUNDS):
        before, order = order, _by_margin(vectors, nodes, ends)
        if before is not None and (order == before).all():
            break
        ends = _means(vectors[order], halves, 2 * num_nodes)
    return order


def _far_apart(vectors: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Of each node the item farthest from its mean, and the item farthest from that one. Shapes: -> [2 S, d]."""
    first = _farthest(vectors, nodes, _means(vectors, nodes, int(nodes[-1]) + 1))
    second = _farthest(vectors, nodes, first)
    return np.stack((first, second), axis=1).reshape(-1, vectors.shape[1])


def _farthest(vectors: np.ndarray, nodes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Of each node the item farthest from the node's point. Shapes: points [S, d] -> [S, d]."""
    distances = np.square(vectors - points[nodes]).sum(1)
    starts = np.flatnonzero(np.r_[True, nodes[1:] != nodes[:-1]])
    return vectors[np.lexsort((-distances, nodes))[starts]]


def _by_margin(vectors: np.ndarray, nodes: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Places by how much nearer they are to the second end than to the first. Shapes: ends [2 S, d] -> [N]."""
    to_first, to_second = (np.square(vectors - ends[2 * nodes + end]).sum(1) for end in (0, 1))
    return np.lexsort((to_first - to_second, nodes))


def _means(vectors: np.ndarray, groups: np.ndarray, num_groups: int) -> np.ndarray:
    """Means of groups 0, 1, 2, ...; zero where one has nothing. Shapes: groups [N] -> [G, d] float32."""
    sums, counts = group_sums(vectors, groups, num_groups)
    return (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
