"""What a search may walk through: the catalogue's trie less the forbidden items, or all paths of codes."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import ConfigError
from models.decoding.allowed_items import AllowedItems
from models.decoding.trie import PrefixTrie, codes_exist, pack, unpack


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """How the prefixes of a level may go on.

    Shapes: W prefixes per user, M candidates per prefix.
    """

    nodes: Tensor
    """[B, W, M] int64, the longer prefixes in ascending order; valid also where not allowed."""
    codes: Tensor | None
    """[B, W, M] int64, their last codes; None where candidate number c is code c."""
    allowed: Tensor | None
    """[B, W, M] bool; None where all are."""


class PathSpace(ABC):
    """Prefixes are integers ("nodes") that sort like their codes; depth 0 has the one node 0."""

    code_sizes: tuple[int, ...]
    allowed: AllowedItems | None
    """What each user may have; None where no item is forbidden."""

    @property
    @abstractmethod
    def num_results(self) -> int:
        """Most items or paths that a search can return without repeating one."""

    @abstractmethod
    def num_nodes(self, depth: int) -> int:
        """Number of different prefixes of this depth."""

    @abstractmethod
    def candidates(self, depth: int, nodes: Tensor) -> Candidates:
        """How nodes [B, W] of this depth may go on."""

    @abstractmethod
    def codes(self, depth: int, nodes: Tensor) -> Tensor:
        """The codes that lead to nodes of this depth. Shapes: [...] -> [..., depth] int64."""

    @abstractmethod
    def find(self, paths: Tensor) -> Tensor:
        """The node of each prefix, or -1 where it is none. Shapes: [..., depth] -> [...] int64."""

    @abstractmethod
    def child_number(self, depth: int, nodes: Tensor, children: Tensor) -> Tensor:
        """Which candidate of each node a child of it is; 0 where it is none. Shapes: 2 x [...] -> [...] int64."""

    @abstractmethod
    def leaf_items(self, leaves: Tensor, is_real: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The first k items of a user's leaves, in their order.

        Shapes: [B, W] int64, [B, W] bool -> items [B, k], leaf numbers in 0..W-1 [B, k]; both -1 in empty slots.
        """

    @abstractmethod
    def draw_items(self, leaves: Tensor, uniform: Tensor) -> Tensor:
        """One of the items of each leaf, all equally likely. Shapes: [B, W] int64, [B, W] in (0, 1) -> [B, W]."""

    def check(self, code_sizes: tuple[int, ...], num_users: int) -> None:
        """Raises: ConfigError if the model has other codes than the catalogue, or users do not match."""
        if tuple(code_sizes) != self.code_sizes:
            raise ConfigError(
                f"the model must have the code sizes of the catalogue's semantic IDs, {list(self.code_sizes)}, "
                f"and it has {list(code_sizes)}; use the table of semantic IDs it was trained with"
            )
        if self.allowed is not None and self.allowed.num_users != num_users:
            raise ConfigError(
                f"the allowed items must be those of the batch's {num_users} users, and they are of "
                f"{self.allowed.num_users}"
            )


class CatalogueSpace(PathSpace):
    """Only paths of items the user may have; a dead branch is never entered."""

    def __init__(self, trie: PrefixTrie, allowed: AllowedItems | None = None):
        self.trie, self.allowed, self.code_sizes = trie, allowed, trie.code_sizes

    @property
    def num_results(self) -> int:
        return self.trie.num_items

    def num_nodes(self, depth: int) -> int:
        return self.trie.num_nodes(depth)

    def candidates(self, depth: int, nodes: Tensor) -> Candidates:
        children, exists = self.trie.children(depth, nodes)
        if self.allowed is not None:
            exists &= _allowed_below(self.trie, self.allowed, depth + 1, children) > 0
        return Candidates(nodes=children, codes=self.trie.codes(depth + 1, children), allowed=exists)

    def codes(self, depth: int, nodes: Tensor) -> Tensor:
        return self.trie.paths(depth, nodes)

    def find(self, paths: Tensor) -> Tensor:
        return self.trie.find(paths)

    def child_number(self, depth: int, nodes: Tensor, children: Tensor) -> Tensor:
        return (children - self.trie.first_child[depth][nodes]).clamp(0, self.trie.max_children[depth] - 1)

    def leaf_items(self, leaves: Tensor, is_real: Tensor, k: int) -> tuple[Tensor, Tensor]:
        first, counts = self._ranks_below(leaves)
        ends = (counts * is_real).cumsum(1)
        slots = torch.arange(k, device=leaves.device).expand(len(leaves), k).contiguous()
        filled = slots < ends[:, -1:]
        numbers = torch.searchsorted(ends, slots, right=True).clamp(max=leaves.shape[1] - 1)
        ranks = first.gather(1, numbers) + slots - (ends - counts * is_real).gather(1, numbers)
        return torch.where(filled, self._items_at(ranks), -1), torch.where(filled, numbers, -1)

    def draw_items(self, leaves: Tensor, uniform: Tensor) -> Tensor:
        first, counts = self._ranks_below(leaves)
        # The largest uniform number times the count may round up to the count itself; a leaf that only fills a row
        # may have none.
        return self._items_at(first + torch.minimum((uniform * counts).long(), (counts - 1).clamp(min=0)))

    def _ranks_below(self, leaves: Tensor) -> tuple[Tensor, Tensor]:
        """Number of the first allowed item of each leaf among those of the user, and how many it has."""
        places = self.trie.first_place[-1]
        start, stop = places[leaves].long(), places[leaves + 1].long()
        if self.allowed is not None:
            start, stop = self.allowed.before(start), self.allowed.before(stop)
        return start, stop - start

    def _items_at(self, ranks: Tensor) -> Tensor:
        places = ranks.clamp(max=self.trie.num_items - 1)
        if self.allowed is not None:
            places = self.allowed.select(ranks)
        return self.trie.items[places].long()


class FreeSpace(PathSpace):
    """All paths of codes, also those of no item: what the bare model would say.

    Nodes are packed prefixes. The trie tells which paths belong to an item, and a path of several items
    stands for the first of them that the user may have; without a trie, none does. Forbidden are paths whose items
    all are, and prefixes that lead to nothing else.
    """

    def __init__(
        self,
        code_sizes: tuple[int, ...],
        trie: PrefixTrie | None = None,
        allowed: AllowedItems | None = None,
    ):
        """Items are forbidden in terms of the trie, which must be given then."""
        self.code_sizes, self.trie, self.allowed = tuple(code_sizes), trie, allowed

    @property
    def num_results(self) -> int:
        return self.num_nodes(len(self.code_sizes))

    def num_nodes(self, depth: int) -> int:
        return math.prod(self.code_sizes[:depth])

    def candidates(self, depth: int, nodes: Tensor) -> Candidates:
        codes = torch.arange(self.code_sizes[depth], device=nodes.device)
        longer = nodes[..., None] * self.code_sizes[depth] + codes
        allowed = None if self.allowed is None else ~self._closed(depth, nodes)
        return Candidates(nodes=longer, codes=None, allowed=allowed)

    def codes(self, depth: int, nodes: Tensor) -> Tensor:
        return unpack(nodes, self.code_sizes[:depth])

    def find(self, paths: Tensor) -> Tensor:
        sizes = self.code_sizes[: paths.shape[-1]]
        return torch.where(codes_exist(paths, sizes), pack(paths, sizes), -1)

    def child_number(self, depth: int, nodes: Tensor, children: Tensor) -> Tensor:
        size = self.code_sizes[depth]
        return (children - nodes * size).clamp(0, size - 1)

    def leaf_items(self, leaves: Tensor, is_real: Tensor, k: int) -> tuple[Tensor, Tensor]:
        numbers = torch.arange(leaves.shape[1], device=leaves.device).expand_as(leaves)
        found = torch.stack((self._first_items(leaves), numbers)).masked_fill(~is_real, -1)
        return F.pad(found, (0, max(k - leaves.shape[1], 0)), value=-1)[..., :k].unbind()

    def draw_items(self, leaves: Tensor, uniform: Tensor) -> Tensor:
        return self._first_items(leaves)

    def _closed(self, depth: int, nodes: Tensor) -> Tensor:
        """Which codes lead only to forbidden items: all their paths are of items. Shapes: [B, W] -> [B, W, K]."""
        parents = self.trie.find_packed(nodes, depth)
        children, exists = self.trie.children(depth, parents.clamp(min=0))
        has_others = self.trie.num_paths(depth + 1, children) < math.prod(self.code_sizes[depth + 1 :])
        is_closed = ~has_others & (_allowed_below(self.trie, self.allowed, depth + 1, children) == 0)
        return self.trie.code_mask(depth + 1, children, exists & (parents[..., None] >= 0) & is_closed)

    def _first_items(self, leaves: Tensor) -> Tensor:
        if self.trie is None:
            return torch.full_like(leaves, -1)
        found = self.trie.find_packed(leaves, self.trie.depth)
        places = self.trie.first_place[-1][found.clamp(min=0)].long()
        if self.allowed is not None:
            places = self.allowed.select(self.allowed.before(places))
        return torch.where(found >= 0, self.trie.items[places], -1).long()


def _allowed_below(trie: PrefixTrie, allowed: AllowedItems, depth: int, siblings: Tensor) -> Tensor:
    """Number of the user's allowed items below nodes that lie side by side. Shapes: [B, W, M] -> [B, W, M]."""
    # The items of one end where those of the next begin.
    edges = torch.cat((siblings[..., :1], siblings + 1), dim=-1)
    return allowed.before(trie.first_place[depth][edges]).diff()
