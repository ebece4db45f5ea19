"""The prefixes of all semantic IDs of a catalogue, as flat sorted tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import ConfigError, DataError

MAX_ITEMS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class PrefixTrie:
    """Nodes of depth d are the distinct prefixes of d codes, in order; the node of depth 0 is the root.

    A prefix is packed into one integer, ((c1 * K2) + c2) * K3 + c3, so sorting packed paths once puts the nodes of
    every depth in order, the children of a node side by side, and so the items below it. Items that share a path
    share a leaf and lie in it in the order of their rows.

    Shapes: N items, L codes per item, n_d nodes of depth d (n_0 = 1).

    Cost: 8 bytes per item, and 16 bytes per node.
    """

    code_sizes: tuple[int, ...]
    """Number of codes of each level."""
    prefixes: tuple[Tensor, ...]
    """Packed prefixes of depth 0..L, [n_d] int64 ascending: the set of legal prefixes of that depth."""
    first_child: tuple[Tensor, ...]
    """Depth 0..L-1: children of node v are first_child[v]..first_child[v + 1] (exclusive), [n_d + 1] int32."""
    first_place: tuple[Tensor, ...]
    """Depth 0..L: places of the items below node v in `items`, as above, [n_d + 1] int32."""
    items: Tensor
    """[N] int32: item rows in the order of their paths."""
    place_of_item: Tensor
    """[N] int32: where each item row stands in `items`."""
    max_children: tuple[int, ...]
    """Largest number of children of a node, by depth 0..L-1; on the host."""

    @staticmethod
    def build(codes: Tensor, code_sizes: tuple[int, ...]) -> "PrefixTrie":
        """Shapes: codes [N, L] of any integer type, one row per item row.

        Raises: DataError where there is no item, a code is out of range or a path has another length;
        ConfigError where a path does not fit into 63 bits.
        """
        _check_codes(codes, code_sizes)
        packed, order = pack(codes, code_sizes).sort(stable=True)
        items = order.int()
        place_of_item = torch.empty_like(items)
        place_of_item[order] = torch.arange(len(items), dtype=torch.int32, device=items.device)
        del order
        prefixes, first_child, first_place = _levels(packed, code_sizes)
        return PrefixTrie(
            code_sizes=tuple(code_sizes),
            prefixes=prefixes,
            first_child=first_child,
            first_place=first_place,
            items=items,
            place_of_item=place_of_item,
            max_children=tuple(int(first.diff().max()) for first in first_child),
        )

    @property
    def depth(self) -> int:
        return len(self.code_sizes)

    @property
    def num_items(self) -> int:
        return self.items.shape[0]

    def num_nodes(self, depth: int) -> int:
        return self.prefixes[depth].shape[0]

    def children(self, depth: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The children of nodes of this depth, side by side, and which of these cells hold one.

        Shapes: nodes [...] -> [..., M] int64 valid nodes of the next depth, [..., M] bool; M is the largest number
        of children at this depth.
        """
        first, last = self._child_range(depth, nodes)
        cells = first[..., None] + torch.arange(self.max_children[depth], device=nodes.device)
        return cells.clamp(max=self.num_nodes(depth + 1) - 1), cells < last[..., None]

    def codes(self, depth: int, nodes: Tensor) -> Tensor:
        """The last code of nodes of this depth. Shapes: [...] -> [...] int64."""
        return self.prefixes[depth][nodes] % self.code_sizes[depth - 1]

    def code_mask(self, depth: int, nodes: Tensor, chosen: Tensor) -> Tensor:
        """The last codes of the chosen among nodes of this depth. Shapes: [..., M], [..., M] bool -> [..., K] bool."""
        size = self.code_sizes[depth - 1]
        codes = torch.where(chosen, self.codes(depth, nodes), size)
        mask = torch.zeros(*nodes.shape[:-1], size + 1, dtype=torch.bool, device=nodes.device)
        return mask.scatter_(-1, codes, True)[..., :size]

    def num_paths(self, depth: int, nodes: Tensor) -> Tensor:
        """Different paths of items below nodes of this depth. Shapes: [...] -> [...] int64."""
        first, last = nodes, nodes + 1
        for of_level in self.first_child[depth:]:
            first, last = of_level[first].long(), of_level[last].long()
        return last - first

    def find(self, paths: Tensor) -> Tensor:
        """The node of each prefix, or -1 where no item begins with it. Shapes: [..., d] -> [...] int64."""
        sizes = self.code_sizes[: paths.shape[-1]]
        return torch.where(codes_exist(paths, sizes), self.find_packed(pack(paths, sizes), len(sizes)), -1)

    def find_packed(self, packed: Tensor, depth: int) -> Tensor:
        """`find` for packed prefixes. Shapes: [...] int64 -> [...] int64."""
        known = self.prefixes[depth]
        nodes = torch.searchsorted(known, packed).clamp(max=len(known) - 1)
        return torch.where(known[nodes] == packed, nodes, -1)

    def paths(self, depth: int, nodes: Tensor) -> Tensor:
        """The codes that lead to nodes of this depth. Shapes: [...] -> [..., depth] int64."""
        return unpack(self.prefixes[depth][nodes], self.code_sizes[:depth])

    def item_nodes(self, depth: int, items: Tensor) -> Tensor:
        """The node of this depth above each item row. Shapes: [...] -> [...] int64."""
        places = self.place_of_item[items]
        return torch.searchsorted(self.first_place[depth], places, right=True) - 1

    def memory_bytes(self) -> int:
        tensors = (*self.prefixes, *self.first_child, *self.first_place, self.items, self.place_of_item)
        return sum(tensor.nbytes for tensor in tensors)

    def to(self, device: torch.device) -> "PrefixTrie":
        move = lambda tensors: tuple(tensor.to(device) for tensor in tensors)  # noqa: E731
        return PrefixTrie(
            code_sizes=self.code_sizes,
            prefixes=move(self.prefixes),
            first_child=move(self.first_child),
            first_place=move(self.first_place),
            items=self.items.to(device),
            place_of_item=self.place_of_item.to(device),
            max_children=self.max_children,
        )

    def _child_range(self, depth: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first_child[depth]
        return first[nodes].long(), first[nodes + 1].long()


def pack(codes: Tensor, code_sizes: tuple[int, ...]) -> Tensor:
    """One integer per prefix, in the order of the prefixes. Shapes: [..., d] -> [...] int64."""
    packed = torch.zeros(codes.shape[:-1], dtype=torch.int64, device=codes.device)
    for level, size in enumerate(code_sizes):
        packed.mul_(size).add_(codes[..., level])
    return packed


def codes_exist(paths: Tensor, code_sizes: tuple[int, ...]) -> Tensor:
    """Whether all codes lie in their levels. Shapes: [..., d] -> [...] bool."""
    exist = (paths >= 0).all(-1)
    # Level by level: a tensor of the sizes would be sent to the device at every call.
    for level, size in enumerate(code_sizes):
        exist &= paths[..., level] < size
    return exist


def unpack(packed: Tensor, code_sizes: tuple[int, ...]) -> Tensor:
    """The way back from `pack`. Shapes: [...] -> [..., d] int64."""
    codes = []
    for size in reversed(code_sizes):
        codes.append(packed % size)
        packed = packed // size
    return torch.stack(codes[::-1], dim=-1) if codes else packed.new_zeros(*packed.shape, 0)


def _levels(
    packed: Tensor, code_sizes: tuple[int, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Prefixes, first children and first places of all depths, from the sorted packed paths."""
    starts = _run_starts(packed)
    prefixes, first_child, first_place = [packed[starts[:-1]]], [], [starts.int()]
    for size in reversed(code_sizes):
        parents = prefixes[0] // size
        starts = _run_starts(parents)
        prefixes.insert(0, parents[starts[:-1]])
        first_child.insert(0, starts.int())
        first_place.insert(0, first_place[0][starts])
    return tuple(prefixes), tuple(first_child), tuple(first_place)


def _run_starts(ordered: Tensor) -> Tensor:
    """Where runs of equal values begin, and the number of values. Shapes: [n] -> [runs + 1] int64."""
    begins = torch.ones(len(ordered) + 1, dtype=torch.bool, device=ordered.device)
    torch.ne(ordered[1:], ordered[:-1], out=begins[1:-1])
    return begins.nonzero()[:, 0]


def _check_codes(codes: Tensor, code_sizes: tuple[int, ...]) -> None:
    if codes.ndim != 2 or codes.shape[1] != len(code_sizes) or not 0 < codes.shape[0] <= MAX_ITEMS:
        raise DataError(
            f"semantic IDs must be given as [1 to {MAX_ITEMS} items, {len(code_sizes)} codes], and these have "
            f"the shape {list(codes.shape)}"
        )
    num_paths = 1
    for size in code_sizes:
        num_paths *= size
    if num_paths >= 2**63:
        raise ConfigError(
            f"a path of codes must fit into 63 bits, and levels of {list(code_sizes)} codes do not; use fewer "
            "or smaller levels"
        )
    low, high = codes.amin(0).tolist(), codes.amax(0).tolist()
    for level, size in enumerate(code_sizes):
        if low[level] < 0 or high[level] >= size:
            raise DataError(
                f"codes of level {level} must lie in 0..{size - 1}, and they lie in {low[level]}..{high[level]}; "
                "the table was made with other code sizes or is damaged"
            )
