"""Items to the nodes below which each gains most, where every node takes only so many: a step of JTM.

Source: Zhu et al., Joint Optimization of Tree-based Index and Deep Model for Recommender Systems (2019), arXiv
1902.07565, the tree learning algorithm. RECONSTRUCTED: of too many items a node keeps those that would lose most
elsewhere. Deviation: where what was found is no better than the old places, a parent's items keep these.

Shapes: N items, K children of each parent, P parents.
"""

import numpy as np

from models.tokenizers.capacity import rank_in_group

NOTHING = -np.inf


def assign_children(gains: np.ndarray, parents: np.ndarray, old: np.ndarray, capacity: int) -> np.ndarray:
    """The child of its parent that each item goes to; equal gains leave it where it is.

    The total gain below a parent is never below that of the old places, where all of its items have one below it.

    Shapes: gains [N, K], parents [N] in 0..P-1, old [N] child numbers, -1 where the old place is below another parent
    -> [N] child numbers. At most K * capacity items may have the same parent.
    """
    chosen = np.full(len(parents), -1)
    is_open = np.ones((parents.max() + 1, gains.shape[1]), dtype=bool)
    waiting = np.arange(len(parents))
    while len(waiting):
        chosen[waiting] = _best_open(gains[waiting], is_open[parents[waiting]], old[waiting])
        waiting = _turn_away(gains, parents, chosen, is_open, capacity)
    return _or_the_old(gains, parents, chosen, old)


def _best_open(gains: np.ndarray, is_open: np.ndarray, old: np.ndarray) -> np.ndarray:
    options = np.where(is_open, gains, NOTHING)
    at_home = np.take_along_axis(options, np.maximum(old, 0)[:, None], axis=1)[:, 0]
    stays = (old >= 0) & (at_home > NOTHING) & (at_home >= options.max(1))
    return np.where(stays, old, options.argmax(1))


def _turn_away(
    gains: np.ndarray, parents: np.ndarray, chosen: np.ndarray, is_open: np.ndarray, capacity: int
) -> np.ndarray:
    """Close the children with too many items, and free those that lose least elsewhere; returns them."""
    cells = parents * gains.shape[1] + chosen
    overfull = np.bincount(cells, minlength=is_open.size) > capacity
    is_open &= ~overfull.reshape(is_open.shape)
    members = np.flatnonzero(overfull[cells])
    elsewhere = np.where(is_open[parents[members]], gains[members], NOTHING).max(1, initial=NOTHING)
    loss = gains[members, chosen[members]] - elsewhere
    members = members[np.lexsort((members, -loss, cells[members]))]
    return members[rank_in_group(cells[members]) >= capacity]


def _or_the_old(gains: np.ndarray, parents: np.ndarray, chosen: np.ndarray, old: np.ndarray) -> np.ndarray:
    items = np.arange(len(parents))
    gained = gains[items, chosen] - gains[items, np.maximum(old, 0)]
    keeps = (np.bincount(parents, old < 0) == 0) & (np.bincount(parents, gained) <= 0)
    return np.where(keeps[parents], old, chosen)
