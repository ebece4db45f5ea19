"""How a trained model is asked: `recommend` and `score`, whatever search stands behind them."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ConfigError, DataError
from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.recommender import Retriever
from models.tables import Lookup, Rows
from sharding.approximate_index import HnswIndex
from sharding.item_index import Found, ItemIndex, best_of_scores, evaluating, rank_in_scores

Scorer = Callable[[SequenceBatch], Tensor]
"""Scores of all items for each user of a batch. Shapes: [B, N] fp32."""


class Search(ABC):
    """Finds items for the users of a batch (on the host); every method is a collective over all ranks."""

    num_items: int
    process: Process | None

    @property
    def longest_list(self) -> int:
        """How many items of a user it can find at most."""
        return self.num_items

    def met(self, lists: np.ndarray, held_out: np.ndarray) -> np.ndarray | None:
        """Which recommended items meet the condition they were searched under; None without conditions.

        Shapes: lists [U, K], held_out [U] -> [U, K].
        """
        return None

    @abstractmethod
    def find(self, batch: SequenceBatch, *, k: int, rank_held_out: bool, filter_seen: bool) -> Found:
        """The k best items of each user (none for k = 0) and, if asked for, the rank of the held-out one."""

    @abstractmethod
    def score(self, batch: SequenceBatch, candidates: Tensor) -> Tensor:
        """Scores of given items. Shapes: candidates [B, C], -1 for none -> [B, C] fp32, -inf for none."""

    def recommend(self, batch: SequenceBatch, k: int, *, filter_seen: bool = True) -> tuple[Tensor, Tensor]:
        """The k best items of each user. Shapes: items and scores [B, k]; empty slots -1 with score -inf."""
        found = self.find(batch, k=k, rank_held_out=False, filter_seen=filter_seen)
        return found.items, found.scores


class RetrievalSearch(Search):
    """Exact search over the vectors of all items, computed once; valid until the model is trained further.

    `precision` is that of computing queries; item vectors and scores are always fp32. With bf16 a query's
    last bits depend on the users it is computed with, so ranks can move a little with the number of workers.
    """

    def __init__(
        self,
        model: Retriever,
        lookup: Lookup,
        index: ItemIndex | HnswIndex,
        *,
        precision: torch.dtype = torch.float32,
    ):
        self.model, self.lookup, self.index, self.precision = model, lookup, index, precision
        self.num_items, self.process = index.num_items, index.process

    @staticmethod
    def build(
        model: Retriever,
        lookup: Lookup,
        *,
        num_items: int,
        device: torch.device,
        process: Process | None = None,
        precision: torch.dtype = torch.float32,
        approximate: bool = False,
        allowed: Tensor | None = None,
    ) -> "RetrievalSearch":
        """`allowed` are the only item rows that are found, where there are such [n].

        Raises: ConfigError where an approximate search is to leave out items.
        """
        if approximate and allowed is not None:
            raise ConfigError(
                "search.allow and search.deny need evaluation.index exact: a graph of neighbours cannot leave out items"
            )
        index = ItemIndex.build(model, lookup, num_items=num_items, device=device, process=process)
        if allowed is not None:
            index.restrict(allowed)
        if approximate:
            index = HnswIndex(index)
        return RetrievalSearch(model, lookup, index, precision=precision)

    def find(self, batch: SequenceBatch, *, k: int, rank_held_out: bool, filter_seen: bool) -> Found:
        device = self.index.device
        exclude = seen_items(batch).to(device) if filter_seen else None
        targets = batch.held_out.to(device) if rank_held_out else None
        return self.index.find(self.queries(batch), exclude, k=k, targets=targets)

    def score(self, batch: SequenceBatch, candidates: Tensor) -> Tensor:
        return self.score_with(self.queries(batch), candidates)

    def score_with(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """Scores of given items for given queries. Shapes: [B, D] or [B, M, D], [B, C] -> [B, C] fp32."""
        with evaluating(self.model):
            ids = self.model.item_ids(candidates.clamp(min=0).flatten())
            vectors = self.model.item_vectors(self.lookup(ids)[next(iter(ids))]).float()
        every = queries[:, None] if queries.dim() == 2 else queries
        scores = torch.einsum("bmd,bcd->bmc", every, vectors.view(*candidates.shape, -1)).amax(1)
        return scores.masked_fill(candidates.to(scores.device) < 0, float("-inf"))

    def queries(self, batch: SequenceBatch) -> Tensor:
        """What item vectors are multiplied with. Shapes: [B, D] or [B, M, D] fp32, as the model's."""
        return self._ask(batch, self.model.query)

    def queries_under(self, batch: SequenceBatch, wanted: Tensor) -> Tensor:
        """The same under each of P conditions; the model must know conditions. Shapes: [B, P] -> [B, P, D]."""
        wanted = wanted.to(self.index.device)
        ask = lambda rows, users: self.model.conditional_queries(rows, users, wanted)  # noqa: E731
        return self._ask(self.model.with_conditions(batch), ask)

    def _ask(self, batch: SequenceBatch, ask: Callable[[Rows, SequenceBatch], Tensor]) -> Tensor:
        device = self.index.device
        is_reduced = self.precision != torch.float32
        with evaluating(self.model), torch.autocast(device.type, self.precision, enabled=is_reduced):
            rows = self.lookup(self.model.query_ids(batch))
            return ask(rows, batch.to(device)).float()


class ScorerSearch(Search):
    """Ranks whatever a function scores for all items; on one process."""

    process = None

    def __init__(self, scorer: Scorer, num_items: int):
        self.scorer, self.num_items = scorer, num_items

    def find(self, batch: SequenceBatch, *, k: int, rank_held_out: bool, filter_seen: bool) -> Found:
        scores = self.scorer(batch).float()
        exclude = seen_items(batch) if filter_seen else None
        ranks = rank_in_scores(scores, batch.held_out, exclude) if rank_held_out else None
        if exclude is not None:
            scores = scores.index_put((exclude.row_index(), exclude.values), torch.tensor(float("-inf")))
        items, best = best_of_scores(scores, k) if k else (None, None)
        return Found(items=items, scores=best, ranks=ranks)

    def score(self, batch: SequenceBatch, candidates: Tensor) -> Tensor:
        scores = self.scorer(batch).float().gather(1, candidates.clamp(min=0))
        return scores.masked_fill(candidates < 0, float("-inf"))


def without_targets(lists: Jagged, targets: Tensor) -> Jagged:
    """Each user's list less one item: a held-out item is ranked even where the user knows it. Shapes: targets [B]."""
    rows = lists.row_index()
    kept = lists.values != targets[rows]
    counts = torch.zeros_like(lists.lengths).index_add_(0, rows, kept.long())
    return Jagged.from_lengths(lists.values[kept], counts.cpu()).to(targets.device)


def seen_items(batch: SequenceBatch) -> Jagged:
    """Every item of the users' known past. Raises: DataError where the batch does not know it."""
    if batch.seen is None:
        raise DataError(
            "leaving out seen items needs batches that hold each user's whole known past (`seen`), and this "
            "one does not; read them with EvaluationStream or give --evaluation.no-filter-seen"
        )
    return batch.seen
