"""Exact search for the best items of a user over item vectors that are spread over the ranks.

Every rank scores the queries of all ranks against its own items; only the few best, or one number per query,
travel back. Matrix products always have the same shape, padded where needed: a score then has the same bits
wherever its item and its query lie, so items with equal vectors tie exactly and results do not depend on the
number of ranks. (With other shapes a library takes other paths, and most scores differ in their last bit.)

A user may come with several queries, of which the best one counts for each item: its score is their largest product.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cluster.errors import DivergenceError
from cluster.process import Process
from data_streams.jagged import Jagged
from models.recommender import Retriever, StepContext
from models.tables import Lookup
from sharding.collectives import exchange_integers, gather_rows, own_rows, rows_to_owners, sum_over_ranks

QUERY_ROWS = 512
"""Queries scored at a time; fewer are padded."""
LOOKUP_ROWS = 16384
"""Items looked up at a time while the index is built."""

_ROW_MASK = 0xFFFFFFFF
_MAGNITUDE_MASK = 0x7FFFFFFF


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and without gradients inside the `with` block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search has found out about this rank's queries. Shapes: B queries."""

    items: Tensor | None = None
    """[B, k] int64 item rows, best first; -1 where fewer than k items are left."""
    scores: Tensor | None = None
    """[B, k] fp32; -inf where there is no item."""
    ranks: Tensor | None = None
    """[B] fp32 rank of the target, 1 for the best; half a place for every other item tied with it. Infinite for one
    that cannot be listed, and where a search that does not look at every item has not found it."""
    measures: Mapping[str, Tensor] = field(default_factory=dict)
    """[B] fp32 each: what else a search says of itself, to be averaged over users."""


class ItemIndex:
    """The vectors of a rank's items, cut into blocks; every method is a collective over all ranks.

    Rank r holds the items of its `StepContext.own_range`.
    """

    def __init__(self, vectors: Tensor, *, num_items: int, process: Process | None = None):
        """Shapes: vectors [own items, D] fp32. Raises: DivergenceError when one of them is not finite."""
        self.process, self.num_items, self.dim = process, num_items, vectors.shape[1]
        self.rank, self.world_size = (process.rank, process.world_size) if process else (0, 1)
        self.start, self.stop = _own_range(num_items, process)
        self.device = vectors.device
        self.block_rows = 16384 if self.device.type == "cuda" else 2048
        bad = exchange_integers([int((~vectors.isfinite().all(1)).sum())], process)
        if any(count for (count,) in bad):
            _raise_not_finite("item vectors", sum(count for (count,) in bad), num_items)
        self.blocks = _in_blocks(vectors, self.block_rows)
        self.closed: Tensor | None = None
        self.closed_blocks: Tensor | None = None

    @staticmethod
    def build(
        model: Retriever,
        lookup: Lookup,
        *,
        num_items: int,
        device: torch.device,
        process: Process | None = None,
    ) -> "ItemIndex":
        """Look up all items and compute their vectors, each rank its own."""
        start, stop = _own_range(num_items, process)
        per_rank = -(-num_items // (process.world_size if process else 1))
        parts = []
        with evaluating(model), torch.autocast(device.type, enabled=False):
            # The number of lookups must not depend on the rank: some ranks have fewer items, or none.
            for first in range(0, per_rank, LOOKUP_ROWS):
                last = min(first + LOOKUP_ROWS, per_rank)
                items = torch.arange(min(start + first, stop), min(start + last, stop))
                ids = model.item_ids(items)
                parts.append(model.item_vectors(lookup(ids)[next(iter(ids))]).float())
        return ItemIndex(torch.cat(parts), num_items=num_items, process=process)

    def restrict(self, items: Tensor) -> None:
        """Find only these items from now on; all others are closed. Shapes: [n] int64 item rows, equal on all ranks."""
        # Of all items, not only this rank's: targets lie anywhere, and no rank need ask another about them.
        self.closed = torch.ones(self.num_items, dtype=torch.bool, device=self.device)
        self.closed[items.to(self.device)] = False
        self.closed_blocks = _in_blocks(self.closed[self.start : self.stop, None], self.block_rows)[..., 0]

    def search(self, queries: Tensor, k: int, exclude: Jagged | None = None) -> tuple[Tensor, Tensor]:
        """The k best items of each query but for its `exclude` row; of equal scores the smaller item first.

        Shapes: queries [B, D] or [B, M, D] -> items [B, k] int64, scores [B, k] fp32; empty slots are -1 with score
        -inf.
        """
        found = self.find(queries, exclude, k=k)
        return found.items, found.scores

    def ranks(self, queries: Tensor, targets: Tensor, exclude: Jagged | None = None) -> Tensor:
        """1 + items scored above the target + half of the others tied with it; the target is never excluded.

        Infinite for a target that `restrict` has closed: it is in no list, however long.

        Shapes: queries [B, D] or [B, M, D], targets [B] int64 -> [B] fp32.
        """
        return self.find(queries, exclude, targets=targets).ranks

    @torch.no_grad()
    def find(
        self, queries: Tensor, exclude: Jagged | None = None, *, k: int = 0, targets: Tensor | None = None
    ) -> Found:
        """`search` (when k is given) and `ranks` (when targets are) with one product per block.

        Cost: M products of a block for M queries a user; all-gathers of queries and excluded items; an all-to-all of
        k numbers per query and rank; all-reduces of the targets' vectors and of one number per query.
        """
        sizes = exchange_integers(
            [queries.shape[0], 0 if exclude is None else exclude.values.shape[0]], self.process
        )
        counts = [size[0] for size in sizes]
        every_query = gather_rows(queries.float(), counts)
        require_finite_queries(every_query)
        excluded = self._excluded_cells(exclude, counts, [size[1] for size in sizes])
        every_target = None if targets is None else gather_rows(targets, counts)
        best, above = self._scan(every_query, excluded, k, every_target)
        items, scores = _decode(self._merge(best, counts, k)) if k else (None, None)
        if targets is None:
            return Found(items=items, scores=scores)
        above = own_rows(sum_over_ranks(above, self.world_size), counts, self.rank)
        ranks = (1 + above.double() / 2).float()
        if self.closed is not None:
            ranks.masked_fill_(self.closed[targets], float("inf"))
        return Found(items=items, scores=scores, ranks=ranks)

    def _scan(
        self, queries: Tensor, excluded: "_Cells", k: int, targets: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Best keys [Q, k] among own items, and twice the places they push each target down [Q]."""
        # The M queries of a user lie apart, so that each product has the shape of one query per user.
        queries = queries[:, None] if queries.dim() == 2 else queries
        chunks = _in_blocks(queries, QUERY_ROWS).transpose(1, 2).contiguous()
        num_rows = chunks.shape[0] * QUERY_ROWS
        best = _encode(torch.full((num_rows, k), float("-inf"), device=self.device), 0)
        above = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        if targets is not None:
            users = torch.arange(len(targets), device=self.device)
            target_cells = self._cells(users, targets, len(queries))
            target_vectors = _in_blocks(self._vectors_of(targets), QUERY_ROWS)
        scores = torch.empty(QUERY_ROWS, self.block_rows, device=self.device)
        for chunk, part in enumerate(chunks):
            rows = slice(chunk * QUERY_ROWS, (chunk + 1) * QUERY_ROWS)
            target_scores = None if targets is None else self._pair_scores(part, target_vectors[chunk])
            for block in range(len(self.blocks)):
                self._score(part, block, scores)
                excluded.clear(scores, chunk, block)
                if k:
                    best[rows] = self._keep_best(best[rows], scores, block)
                if target_scores is not None:
                    target_cells.clear(scores, chunk, block)
                    above[rows] += _twice_places_above(scores, target_scores)
        return best[: len(queries)], above[: len(queries)]

    def _score(self, queries: Tensor, block: int, scores: Tensor) -> None:
        """Shapes: queries [M, Q, D], scores [Q, n], which are overwritten."""
        with torch.autocast(self.device.type, enabled=False):
            torch.mm(queries[0], self.blocks[block].T, out=scores)
            for others in queries[1:]:
                torch.maximum(scores, others @ self.blocks[block].T, out=scores)
        scores[:, self.stop - self.start - block * self.block_rows :] = float("-inf")
        if self.closed_blocks is not None:
            scores.masked_fill_(self.closed_blocks[block], float("-inf"))

    def _pair_scores(self, queries: Tensor, vectors: Tensor) -> Tensor:
        """Score of each user with one vector, with the bits of a block. Shapes: [M, Q, D], [Q, D] -> [Q, 1]."""
        block = queries.new_zeros(self.block_rows, self.dim)
        block[:QUERY_ROWS] = vectors
        with torch.autocast(self.device.type, enabled=False):
            # One by one: a product of all at once may round in another way.
            return torch.stack([(part @ block.T).diagonal() for part in queries]).amax(0)[:, None]

    def _keep_best(self, best: Tensor, scores: Tensor, block: int) -> Tensor:
        keys = _encode(scores, self.start + block * self.block_rows)
        among = keys.topk(min(best.shape[1], self.block_rows), dim=1, sorted=False).values
        return torch.cat((best, among), dim=1).topk(best.shape[1], dim=1).values

    def _merge(self, best: Tensor, counts: list[int], k: int) -> Tensor:
        """This rank's queries' best keys over all ranks. Shapes: [Q, k] -> [B, k]."""
        per_rank = rows_to_owners(best, counts, self.rank)
        return per_rank.transpose(0, 1).flatten(1).topk(k, dim=1).values

    def _vectors_of(self, items: Tensor) -> Tensor:
        """Vectors of any items, wherever they lie. Shapes: [n] -> [n, D]."""
        vectors = torch.zeros(len(items), self.dim, device=self.device)
        own = (items >= self.start) & (items < self.stop)
        vectors[own] = self.blocks.flatten(0, 1)[items[own] - self.start]
        return sum_over_ranks(vectors, self.world_size)

    def _excluded_cells(self, exclude: Jagged | None, counts: list[int], sizes: list[int]) -> "_Cells":
        nothing = torch.zeros(0, dtype=torch.int64, device=self.device)
        users = nothing if exclude is None else exclude.row_index() + sum(counts[: self.rank])
        items = nothing if exclude is None else exclude.values
        return self._cells(gather_rows(users, sizes), gather_rows(items, sizes), sum(counts))

    def _cells(self, users: Tensor, items: Tensor, num_queries: int) -> "_Cells":
        own = (items >= self.start) & (items < self.stop)
        columns = items[own] - self.start
        num_chunks = -(-num_queries // QUERY_ROWS)
        return _Cells(users[own], columns, num_chunks, len(self.blocks), self.block_rows)


class _Cells:
    """Cells of the matrix of all scores, grouped by the chunk of queries and block of items they lie in."""

    def __init__(self, rows: Tensor, columns: Tensor, num_chunks: int, num_blocks: int, block_rows: int):
        group = rows // QUERY_ROWS * num_blocks + columns // block_rows
        group, order = group.sort()
        self.rows, self.columns = (rows % QUERY_ROWS)[order], (columns % block_rows)[order]
        borders = torch.arange(num_chunks * num_blocks + 1, device=group.device)
        self.borders, self.num_blocks = torch.searchsorted(group, borders).tolist(), num_blocks

    def clear(self, scores: Tensor, chunk: int, block: int) -> None:
        """Take the cells of one chunk and block out of the ranking."""
        place = chunk * self.num_blocks + block
        here = slice(self.borders[place], self.borders[place + 1])
        scores[self.rows[here], self.columns[here]] = float("-inf")


def best_of_scores(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row; equal scores go to the smaller column, -inf is no candidate.

    Shapes: [B, N] -> items [B, k] int64, scores [B, k] fp32; empty slots are -1 with score -inf.
    """
    keys = _encode(scores.float(), 0).topk(min(k, scores.shape[1]), dim=1).values
    items, best = _decode(keys)
    missing = (0, k - keys.shape[1])
    return nn.functional.pad(items, missing, value=-1), nn.functional.pad(best, missing, value=float("-inf"))


def rank_in_scores(scores: Tensor, targets: Tensor, exclude: Jagged | None) -> Tensor:
    """`ItemIndex.ranks` where all scores are there. Shapes: [B, N], [B] -> [B] fp32."""
    target_scores = scores.gather(1, targets[:, None])
    others = scores.scatter(1, targets[:, None], float("-inf"))
    if exclude is not None:
        others[exclude.row_index(), exclude.values] = float("-inf")
    return (1 + _twice_places_above(others, target_scores).double() / 2).float()


def _own_range(num_items: int, process: Process | None) -> tuple[int, int]:
    rank, world_size = (process.rank, process.world_size) if process else (0, 1)
    return StepContext(step=0, rank=rank, world_size=world_size).own_range(num_items)


def _in_blocks(rows: Tensor, block_rows: int) -> Tensor:
    """Shapes: [n, ...] -> [ceil(n / block_rows), block_rows, ...], the last one filled up with zeros."""
    num_blocks = -(-rows.shape[0] // block_rows)
    padded = rows.new_zeros(num_blocks * block_rows, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    return padded.view(num_blocks, block_rows, *rows.shape[1:])


def _twice_places_above(scores: Tensor, target_scores: Tensor) -> Tensor:
    """Per row, two for every score above the target's and one for every tie; -inf counts nothing.

    Shapes: scores [Q, n], target_scores [Q, 1] -> [Q] int64.
    """
    # 2 above + tied = n + above - below, and one sum over signs is several times faster than two comparisons.
    signs = (scores - target_scores).sign_().sum(1)
    return signs.long() + scores.shape[1]


def _encode(scores: Tensor, first_item: int) -> Tensor:
    """Numbers that sort by score, and among equal scores put the smaller item first.

    The bits of an fp32 number, read as an integer, sort like the number itself once those of negative ones
    are turned around. The lower half holds the item row, inverted. Adding zero makes -0.0 equal to 0.0.

    Shapes: [Q, n] fp32 -> [Q, n] int64.
    """
    # In place: the matrix is large, and memory that is new each time costs more than the arithmetic.
    bits = (scores + 0.0).view(torch.int32)
    bits ^= (bits >> 31).bitwise_and_(_MAGNITUDE_MASK)
    keys = bits.long()
    keys <<= 32
    keys |= _ROW_MASK - torch.arange(first_item, first_item + scores.shape[1], device=scores.device)
    return keys


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Items and scores of keys; what scores -inf is no item."""
    ordered = (keys >> 32).int()
    scores = (ordered ^ ((ordered >> 31) & _MAGNITUDE_MASK)).view(torch.float32)
    items = _ROW_MASK - (keys & _ROW_MASK)
    return torch.where(scores == float("-inf"), -1, items), scores


def require_finite_queries(queries: Tensor) -> None:
    """Shapes: [Q, D] or [Q, M, D], of all ranks. Raises: DivergenceError when one of them is not finite."""
    bad = int((~queries.flatten(1).isfinite().all(1)).sum())
    if bad:
        _raise_not_finite("users' query vectors", bad, len(queries))


def _raise_not_finite(what: str, bad: int, total: int) -> None:
    raise DivergenceError(
        f"{what} must be finite to be ranked, and {bad} of {total} are not; the model has diverged: take "
        "an earlier checkpoint, or train again with a lower learning rate"
    )
