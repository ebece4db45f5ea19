"""Approximate search for the best items of a user: a graph of neighbours (HNSW) over each rank's own items.

For catalogues too large to score all of it at each request. The graph is searched for a few items more than are wanted,
since seen ones are taken out afterwards.
"""

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ConfigError
from data_streams.jagged import Jagged
from sharding.collectives import exchange_integers, gather_rows, own_rows
from sharding.item_index import Found, ItemIndex, best_of_scores, require_finite_queries

NEIGHBOURS = 32
SEARCH_BREADTH = 256


class HnswIndex:
    """Answers as an `ItemIndex`, but may miss items; every method is a collective over all ranks."""

    def __init__(self, exact: ItemIndex):
        """Raises: ConfigError for an index that is restricted to some of the items."""
        if exact.closed is not None:
            raise ConfigError(
                "search.allow and search.deny need evaluation.index exact: a graph of neighbours cannot leave out items"
            )
        import faiss

        self.num_items, self.process, self.device = exact.num_items, exact.process, exact.device
        self.start, self.rank, self.world_size = exact.start, exact.rank, exact.world_size
        self.num_own = exact.stop - exact.start
        self.graph = faiss.IndexHNSWFlat(exact.dim, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        self.graph.hnsw.efSearch = SEARCH_BREADTH
        vectors = exact.blocks.flatten(0, 1)[: self.num_own].cpu().numpy()
        if self.num_own:
            self.graph.add(np.ascontiguousarray(vectors))

    @torch.no_grad()
    def find(
        self, queries: Tensor, exclude: Jagged | None = None, *, k: int = 0, targets: Tensor | None = None
    ) -> Found:
        """As `ItemIndex.find`; a target that was not found has an infinite rank.

        Raises: ConfigError where users come with several queries; DivergenceError where one of them is not finite.
        """
        if queries.dim() == 3:
            raise ConfigError(
                "evaluation.index hnsw searches by one query per user, and the model asks with "
                f"{queries.shape[1]}; say --evaluation.index exact"
            )
        longest = 0 if exclude is None else exclude.max_length
        sizes = exchange_integers([queries.shape[0], longest], self.process)
        counts, wide = [size[0] for size in sizes], max(k, SEARCH_BREADTH) + max(size[1] for size in sizes)
        every_query = gather_rows(queries.float(), counts)
        require_finite_queries(every_query)
        items, scores = self._search_own(every_query.cpu().numpy(), min(wide, self.num_items))
        items, scores = self._join(items, scores, counts)
        # Of equal scores the smaller item comes first, as in the exact index.
        items, order = items.sort(dim=1)
        scores = scores.gather(1, order)
        found = scores
        if exclude is not None:
            scores = _without(items, scores, exclude)
        ranks = None if targets is None else self._ranks(items == targets[:, None], found, scores)
        place, best = best_of_scores(scores, k) if k else (None, None)
        if place is not None:
            place = items.gather(1, place.clamp(min=0)).masked_fill(place < 0, -1)
        return Found(items=place, scores=best, ranks=ranks)

    def _ranks(self, is_target: Tensor, found: Tensor, scores: Tensor) -> Tensor:
        """`scores` are those that were found but for excluded items. Shapes: [B, n] each -> [B] fp32."""
        own = found.gather(1, is_target.to(torch.int64).argmax(1, keepdim=True))
        others = scores.masked_fill(is_target, float("-inf"))
        ranks = 1 + (others > own).sum(1) + (others == own).sum(1) / 2
        return ranks.masked_fill(~is_target.any(1), float("inf")).float()

    def _search_own(self, queries: np.ndarray, wide: int) -> tuple[Tensor, Tensor]:
        """Shapes: [Q, D] -> items and scores [Q, wide]; -1 and -inf where the graph found fewer."""
        if not self.num_own or not len(queries):
            missing = torch.full((len(queries), wide), -1)
            return missing, missing.float() * float("inf")
        scores, items = self.graph.search(queries, wide)
        found = torch.from_numpy(items)
        items = torch.where(found < 0, -1, found + self.start)
        return items, torch.from_numpy(scores).masked_fill(found < 0, float("-inf"))

    def _join(self, items: Tensor, scores: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """What all ranks have found for this rank's queries. Shapes: [Q, wide] -> [B, ranks * wide]."""
        if self.world_size == 1:
            return items.to(self.device), scores.to(self.device)
        rows = [items.shape[0]] * self.world_size
        joined = [
            gather_rows(part.to(self.device), rows)
            .unflatten(0, (self.world_size, -1))
            .transpose(0, 1)
            .flatten(1)
            for part in (items, scores)
        ]
        return tuple(own_rows(part, counts, self.rank) for part in joined)


def _without(items: Tensor, scores: Tensor, exclude: Jagged) -> Tensor:
    """Take excluded items out. Shapes: [B, n] each -> [B, n]."""
    rows = torch.arange(items.shape[0], device=items.device)[:, None]
    span = int(max(items.max(), exclude.values.max())) + 2 if items.numel() and exclude.values.numel() else 1
    out = torch.isin(rows * span + items, exclude.row_index() * span + exclude.values)
    return scores.masked_fill(out, float("-inf"))
