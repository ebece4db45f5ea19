"""Items that share a path: told apart by an extra code, or moved to the nearest paths that have room.

Shapes: n items, L levels, d width of the tokenizer's points.
"""

from collections.abc import Sequence
from math import prod
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from cluster.errors import ConfigError
from models.tokenizers.capacity import assign_within_capacity, rank_in_group
from models.tokenizers.clustering import squared_distances
from models.tokenizers.tokenizer import Matrix, Points, Tokenizer, blocks, path_points

Method = Literal["extra-code", "reassign", "keep"]
"""How items that share a path are told apart."""


def number_in_group(codes: np.ndarray, taken: np.ndarray | None = None) -> np.ndarray:
    """The smallest numbers 0, 1, 2, ... that tell items of one path apart, in the order of the items.

    `taken` are full paths of other items, the last code of which is such a number: these stay theirs.

    Shapes: codes [n, L], taken [m, L + 1] -> [n] int32.
    """
    if taken is None:
        taken = np.empty((0, codes.shape[1] + 1), dtype=np.int32)
    every = np.concatenate([taken[:, :-1], codes])
    group = np.unique(every, axis=0, return_inverse=True)[1].reshape(-1)
    old_group, group = group[: len(taken)], group[len(taken) :]
    order = np.argsort(group, kind="stable")
    numbers = np.empty(len(codes), dtype=np.int32)
    numbers[order] = rank_in_group(group[order])
    # Only where old items stand may the n-th free number be another than n.
    for crowded in np.intersect1d(group, old_group):
        members, used = np.flatnonzero(group == crowded), taken[old_group == crowded, -1]
        numbers[members] = np.setdiff1d(np.arange(len(members) + used.max() + 1), used)[: len(members)]
    return numbers


def spread(
    points: Matrix,
    codes: np.ndarray,
    code_vectors: Sequence[np.ndarray],
    *,
    path_capacity: int = 1,
    taken: np.ndarray | None = None,
) -> np.ndarray:
    """Move items so that no path holds more than `path_capacity` of them, each as little as possible.

    Level by level, where the paths below a code have no room for all its items, items under the same prefix are
    dealt out anew among the codes of the level: at the last one at the least total squared distance, at the others
    (which overflow only where a code has more items than paths) the nearest pairs first. Moved items choose their
    further codes again. `taken` are the paths of other items, which stay. Only points that may move are read.

    Shapes: points [n, d], codes [n, L], taken [m, L] -> [n, L] int32.
    Raises: ConfigError when all paths together have too little room.
    """
    sizes = [len(vectors) for vectors in code_vectors]
    taken = np.empty((0, len(sizes)), dtype=np.int32) if taken is None else taken
    if len(codes) + len(taken) > prod(sizes) * path_capacity:
        raise ConfigError(
            f"{' x '.join(map(str, sizes))} codes give {prod(sizes) * path_capacity} places, too few for "
            f"{len(codes) + len(taken)} items; make a table with more of them, by --code-sizes (of finite-scalar, "
            "--values or --levels) or --extra-codes"
        )
    codes = codes.copy()
    for level in range(len(sizes)):
        room = path_capacity * prod(sizes[level + 1 :])
        for members, free in _overfull(codes[:, : level + 1], taken[:, : level + 1], sizes[level], room):
            prefix = path_points(codes[members, :level], code_vectors)
            residual = points[members] - prefix
            is_last = level == len(sizes) - 1
            assign = _assign_cheapest if is_last else assign_within_capacity
            codes[members, level] = assign(residual, code_vectors[level], free)
            for lower in range(level + 1, len(sizes)):
                residual = residual - code_vectors[lower - 1][codes[members, lower - 1]]
                codes[members, lower] = squared_distances(residual, code_vectors[lower]).argmin(axis=1)
    return codes


def _overfull(codes: np.ndarray, taken: np.ndarray, size: int, room: int):
    """(items, free room of each code) of every prefix under which a code has more items than room.

    Shapes: codes [n, l + 1], taken [m, l + 1].
    """
    every = np.concatenate([codes, taken])
    group, first = np.unique(every, axis=0, return_inverse=True, return_index=True)[1:][::-1]
    group = group.reshape(-1)
    is_full = np.bincount(group) > room
    # A code that old items alone fill is no matter unless a new one is there too.
    is_full &= np.bincount(group[: len(codes)], minlength=len(is_full)) > 0
    if not is_full.any():
        return
    prefixes = np.unique(every[:, :-1], axis=0, return_inverse=True)[1].reshape(-1)
    own, old = prefixes[: len(codes)], prefixes[len(codes) :]
    order, old_order = np.argsort(own, kind="stable"), np.argsort(old, kind="stable")
    for prefix in np.unique(prefixes[first[is_full]]):
        members = order[slice(*np.searchsorted(own, [prefix, prefix + 1], sorter=order))]
        others = old_order[slice(*np.searchsorted(old, [prefix, prefix + 1], sorter=old_order))]
        yield members, np.maximum(room - np.bincount(taken[others, -1], minlength=size), 0)


def _assign_cheapest(points: np.ndarray, centroids: np.ndarray, capacities: np.ndarray) -> np.ndarray:
    """Least total squared distance under the capacities. Shapes: [n, d], [K, d], [K] -> [n]."""
    places = np.repeat(np.arange(len(centroids)), np.minimum(capacities, len(points)))
    chosen = linear_sum_assignment(squared_distances(points, centroids)[:, places])[1]
    return places[chosen]


def tell_apart(
    tokenizer: Tokenizer,
    vectors: Matrix,
    codes: np.ndarray,
    *,
    method: Method,
    extra_codes: int | None = None,
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Codes of a catalogue without, or with numbered, collisions, and the size of each level.

    `extra-code` adds a level of `extra_codes` numbers (None: as many as the largest group has items); items beyond
    that move to the nearest path with room. `reassign` moves all but one item of each path. `keep` does nothing.

    Shapes: codes [N, L] -> [N, L or L + 1] int32.
    """
    sizes, points = tokenizer.code_sizes, Points(tokenizer, vectors)
    if method == "keep":
        return codes, sizes
    if method == "reassign":
        return spread(points, codes, tokenizer.code_vectors), sizes
    if extra_codes is not None:
        codes = spread(points, codes, tokenizer.code_vectors, path_capacity=extra_codes)
    numbers = number_in_group(codes)
    return np.column_stack([codes, numbers]), (*sizes, extra_codes or int(numbers.max()) + 1)


def codes_of_new_items(
    tokenizer: Tokenizer,
    vectors: Matrix,
    taken: np.ndarray,
    *,
    method: Method,
    code_sizes: Sequence[int],
) -> np.ndarray:
    """Codes of items that are added to a table, whose codes `taken` stay; no level grows.

    Shapes: vectors [n, D], taken [m, L or L + 1] -> [n, L or L + 1] int32.
    Raises: ConfigError when the levels have too little room.
    """
    codes = np.concatenate([tokenizer.encode(block) for _, block in blocks(vectors)])
    points = Points(tokenizer, vectors)
    if method == "keep":
        return codes
    if method == "reassign":
        return spread(points, codes, tokenizer.code_vectors, taken=taken)
    codes = spread(points, codes, tokenizer.code_vectors, path_capacity=code_sizes[-1], taken=taken[:, :-1])
    return np.column_stack([codes, number_in_group(codes, taken)])
