"""The first tree of TDM, from categories: alike items start near each other.

Source: Zhu et al., Learning Tree-based Deep Model for Recommender Systems (2018), section on tree initialisation.
Deviation: an item with several categories keeps the one at a given place of its list, since lists of this schema go
from the broad to the narrow; the paper draws one.
"""

import numpy as np

from cluster.seeds import purpose_seed
from models.trees.shape import codes_of_order


def category_tree(categories: np.ndarray, *, branching: int, seed: int) -> np.ndarray:
    """Categories in random order, items in random order inside each, cut in halves until one item is left.

    Shapes: categories [N] int, -1 for items without one, which stay together -> codes [N, D] int32.
    """
    random = np.random.default_rng(purpose_seed(seed, "category tree"))
    _, groups = np.unique(categories, return_inverse=True)
    place_of_group = random.permutation(groups.max() + 1)
    # Equal categories in the order of random numbers.
    order = np.lexsort((random.permutation(len(groups)), place_of_group[groups]))
    return codes_of_order(order, branching)
