"""The shape of a tree index: every item is a leaf, and so a path of codes, each of which names a child.

The tree is complete: leaves have numbers 0..b^D - 1, and the digits of a number in base b are the path. A list of N
items fills it evenly when place i gets leaf i * b^D // N: that is the list cut in halves, again and again, until one
item is left, but for lengths that cannot be halved evenly, whose parts differ by one at every depth.

Shapes: N items, branching b, depth D.
"""

import numpy as np

from cluster.errors import ConfigError, DataError

MOST_PLACES = 2**62
"""Of leaf numbers times items."""


def tree_depth(num_items: int, branching: int) -> int:
    """Levels below the root that have room for all items; at least 2, so that there are inner nodes.

    Raises: ConfigError for a branching that is no power of two; DataError for fewer items than can have a tree.
    """
    if branching < 2 or branching & (branching - 1):
        raise ConfigError(
            f"--branching must be a power of two, since every split is made of halves, and it is {branching}; "
            "give 2, 4, 8, ..."
        )
    if num_items <= branching:
        raise DataError(
            f"a tree needs more items than one node has children ({branching}), and there are {num_items}; lower "
            "--branching, or rank so few items without a tree"
        )
    depth = 2
    while branching**depth < num_items:
        depth += 1
    return depth


def even_leaves(num_items: int, num_leaves: int) -> np.ndarray:
    """The leaf of each place of a list of items. Shapes: [N] int64 ascending, all different."""
    if num_items * num_leaves > MOST_PLACES:
        raise DataError(
            f"a tree has room for a billion items, and there are {num_items}; build several trees"
        )
    return np.arange(num_items, dtype=np.int64) * num_leaves // num_items


def leaf_codes(leaves: np.ndarray, branching: int, depth: int) -> np.ndarray:
    """The path to each leaf, the first code first. Shapes: [N] -> [N, D] int32."""
    below = branching ** np.arange(depth - 1, -1, -1, dtype=np.int64)
    return (leaves[:, None] // below % branching).astype(np.int32)


def codes_of_order(order: np.ndarray, branching: int) -> np.ndarray:
    """The tree over a list of item rows, which is a permutation. Shapes: [N] -> [N, D] int32, by item row."""
    depth = tree_depth(len(order), branching)
    leaves = np.empty(len(order), dtype=np.int64)
    leaves[order] = even_leaves(len(order), branching**depth)
    return leaf_codes(leaves, branching, depth)
