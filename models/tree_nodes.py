"""The nodes of a tree index, as rows of tables: leaves are items, inner nodes have rows by their place.

A place of a depth is the number of a path of so many codes in the complete tree, whether or not an item lies below it.
So another tree of the same shape keeps the rows of its places, while items take theirs with them.

Shapes: N items, D depth, n_d nodes of depth d with an item below them.
"""

import math

import numpy as np
import torch
from torch import Tensor

from cluster.errors import DataError
from cluster.user_draws import uniform_of_events
from models.decoding.trie import PrefixTrie, pack
from models.semantic_ids import SemanticIds

LEAF_SHARE, LAST_INNER_SHARE = 0.4, 0.15
"""Of the negatives, those of the leaves and of the nodes above them."""


class TreeNodes:
    """On the host, where ids are made."""

    def __init__(self, semantic_ids: SemanticIds):
        """Raises: DataError where items share a leaf, or there are no inner nodes."""
        self.code_sizes = tuple(semantic_ids.code_sizes)
        self.depth = len(self.code_sizes)
        self.trie = PrefixTrie.build(semantic_ids.codes, self.code_sizes)
        self.leaves = pack(semantic_ids.codes, self.code_sizes)
        _check_tree(self.trie)
        widths = [math.prod(self.code_sizes[:depth]) for depth in range(1, self.depth)]
        self._first_row = [0, 0, *np.cumsum(widths).tolist()]
        self.num_inner = sum(widths)

    @property
    def inner_depths(self) -> range:
        return range(1, self.depth)

    @property
    def depths(self) -> range:
        return range(1, self.depth + 1)

    def is_single(self, depth: int) -> bool:
        """Whether a node of this depth has no other beside it."""
        return self.trie.num_nodes(depth) == 1

    def above(self, depth: int, items: Tensor) -> Tensor:
        """The place of this depth above each item. Shapes: [...] -> [...] int64."""
        return self.leaves[items] // math.prod(self.code_sizes[depth:])

    def rows(self, depth: int, places: Tensor) -> Tensor:
        """Rows of the table of inner nodes, or of items at the leaves; some item's where a leaf has none."""
        if depth < self.depth:
            return places + self._first_row[depth]
        return self.trie.items[self.trie.find_packed(places, depth).clamp(min=0)].long()

    def draw_negatives(
        self, depth: int, items: Tensor, count: int, *, seed: int, users: Tensor, numbers: Tensor
    ) -> Tensor:
        """Places of other nodes of the same depth, all equally likely, that lie above some item.

        They depend on the seed, the user and the number of the sample within the user alone, so that no dealing of
        users to workers changes them.

        Shapes: items, users, numbers [S] -> [S, count] int64.
        """
        num_others = self.trie.num_nodes(depth) - 1
        draws = numbers[:, None] * count + torch.arange(count)
        uniform = uniform_of_events(seed, users[:, None].expand_as(draws).numpy(), draws.numpy())
        drawn = (torch.from_numpy(uniform) * num_others).long().clamp(max=num_others - 1)
        own = self.trie.item_nodes(depth, items)[:, None]
        return self.trie.prefixes[depth][drawn + (drawn >= own)]

    def negatives_per_depth(self, total: int) -> tuple[int, ...]:
        """So many negatives, more of them near the leaves, none where a depth has no other node.

        Of 100: 40 leaves, 15 of the nodes above them, the others in proportion to their depth, which follows the
        published list for 22 levels (0, 1, 2, ..., 15, 17, 19, 22, 25, 30, 76, 200); at most as many as there are
        other nodes.
        """
        others = sum(range(1, self.depth - 1))
        shares = [(1 - LEAF_SHARE - LAST_INNER_SHARE) * depth / others for depth in range(1, self.depth - 1)]
        wanted = [max(round(total * share), 1) for share in (*shares, LAST_INNER_SHARE, LEAF_SHARE)]
        return tuple(
            min(number, self.trie.num_nodes(depth) - 1) for depth, number in enumerate(wanted, start=1)
        )


def _check_tree(trie: PrefixTrie) -> None:
    shared = trie.num_items - trie.num_nodes(trie.depth)
    if shared or trie.depth < 2:
        raise DataError(
            f"a tree index needs at least two levels and a leaf for each item, and these semantic IDs have "
            f"{trie.depth} levels and {shared} items too many for their paths; make one with grail tokenize tree"
        )
