"""Evaluation of a search on held-out items, and recommendations for users, by any number of workers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from rich.table import Table
from torch import Tensor

from cluster.errors import DataError, NobodyHeldOutError
from cluster.memory import FreedMemory
from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.item_table import ItemTable
from sharding.collectives import broadcast_json, exchange_integers, gather_on_first
from trainer.configuration import EvaluationConfig
from trainer.metrics import (
    bootstrap_intervals,
    category_vectors,
    coverage_at,
    diversity_at,
    head_items,
    ndcg_at,
    novelty_at,
    recall_at,
    reciprocal_rank,
    share_met_at,
    unit_vectors,
)
from trainer.search import Search
from trainer.slices import Slices, by_training_events

Batch = TypeVar("Batch")

Utilities = Callable[[np.ndarray, np.ndarray, Sequence[int]], Mapping[int, np.ndarray]]
"""(user rows [U], lists [U, K], cutoffs) -> true utility of each list at each cutoff."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What `evaluation.json` holds."""

    split: str
    num_users: int
    seen_filtered: bool
    """Whether items of each user's known past were left out of the ranking."""
    seen_held_out: int = 0
    """Users whose held-out item is of their known past and was ranked all the same, where such items were left out."""
    metrics: Mapping[str, float]
    """`recall@10` and so on, means over users."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """95 % bootstrap interval over users, for the metrics that are means over users."""
    slices: Slices = field(default_factory=dict)
    """Of the users whose held-out item has so many training events: their number, and means of the metrics of ranks."""
    checkpoint: str | None = None
    """Name of the evaluated checkpoint."""
    step: int | None = None
    """Optimizer steps it was trained for."""

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        content["intervals"] = {name: list(interval) for name, interval in self.intervals.items()}
        return content


def evaluate(
    search: Search,
    batches: Iterable[SequenceBatch],
    *,
    empty_batch: SequenceBatch,
    items: ItemTable,
    config: EvaluationConfig,
    split: str,
    seed: int = 0,
    utilities: Utilities | None = None,
    keep: Callable[[np.ndarray, Mapping[str, np.ndarray]], None] | None = None,
) -> EvaluationResult:
    """Rank the held-out item of every user among all items, and look at the recommended lists.

    `batches` are this rank's users; ranks may have different numbers of them. `utilities` tells the true utility of
    lists, where the truth is known; `keep` gets the user rows and each metric by user, on rank 0. A collective call,
    whose result is the same on every rank.

    Raises: NobodyHeldOutError when there are no users; DataError when one was evaluated twice.
    """
    longest = max(config.cutoffs)
    ranked = _rank_users(search, batches, empty_batch, config, k=longest)
    outcome = None
    if ranked is not None:
        per_user = _user_metrics(ranked, search, items, config.cutoffs, utilities)
        if keep is not None:
            keep(ranked.users, per_user)
        coverage = {f"coverage@{k}": coverage_at(ranked.lists, k, search.num_items) for k in config.cutoffs}
        outcome = {
            "num_users": len(ranked.users),
            "seen_held_out": int(ranked.has_seen.sum()),
            "metrics": _means(per_user) | coverage,
            "slices": by_training_events(
                items.train_counts[ranked.held_out], _rank_metrics(ranked.ranks, config.cutoffs)
            ),
            "intervals": bootstrap_intervals(per_user, resamples=config.bootstrap_resamples, seed=seed)
            if config.bootstrap_resamples
            else {},
        }
    outcome = broadcast_json(outcome, search.process)
    intervals = {name: (low, high) for name, (low, high) in outcome.pop("intervals").items()}
    return EvaluationResult(split=split, seen_filtered=config.filter_seen, intervals=intervals, **outcome)


def validation_metrics(
    search: Search, batches: Iterable[SequenceBatch], *, empty_batch: SequenceBatch, config: EvaluationConfig
) -> dict[str, float]:
    """recall@k, ndcg@k and mrr alone, as needed while training. A collective call, equal on every rank."""
    ranked = _rank_users(search, batches, empty_batch, config, k=0)
    means = None if ranked is None else _means(_rank_metrics(ranked.ranks, config.cutoffs))
    return broadcast_json(means, search.process)


def recommend(
    search: Search,
    batches: Iterable[SequenceBatch],
    *,
    k: int,
    empty_batch: SequenceBatch,
    filter_seen: bool = True,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """User rows [B], item rows [B, k] and scores [B, k] of this rank's users; every rank must exhaust it.

    Empty slots are -1 with score -inf.
    """
    for batch in in_step(batches, empty_batch, search.process):
        items, scores = search.recommend(batch, k, filter_seen=filter_seen)
        if batch.num_users:
            yield batch.user_ids, items.cpu(), scores.cpu()


def recommendation_table(user_ids: Tensor, items: Tensor, scores: Tensor) -> pa.Table:
    """One row per recommendation: user_row, rank (from 1), item_row, score; empty slots are left out.

    Shapes: user_ids [B], items and scores [B, k], items -1 where a slot is empty.
    """
    rank = torch.arange(1, items.shape[1] + 1).expand_as(items)
    users = user_ids[:, None].expand_as(items)
    filled = items >= 0
    columns = {"user_row": users, "rank": rank, "item_row": items, "score": scores}
    return pa.table({name: column[filled].numpy() for name, column in columns.items()})


def render(results: Mapping[str, EvaluationResult]) -> Table:
    """A table of the metrics, one column per evaluated system, saying whether seen items were filtered.

    A single system is shown with its intervals; several stand side by side without, and a metric of the first that
    another does not have is an empty cell there.
    """
    first = next(iter(results.values()))
    seen = "seen items left out" if first.seen_filtered else "seen items not left out"
    if first.seen_held_out:
        seen += f"\nbut for the held-out ones of {first.seen_held_out:,} users"
    table = Table(title=f"{first.split} split, {first.num_users:,} users\n{seen}")
    table.add_column("metric")
    for name in results:
        table.add_column(name, justify="right")
    if len(results) == 1:
        table.add_column("95 % interval", justify="right")
    for metric in first.metrics:
        values = [result.metrics.get(metric) for result in results.values()]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        if len(results) == 1:
            low, high = first.intervals.get(metric, (None, None))
            cells.append("" if low is None else f"{low:.4f} to {high:.4f}")
        table.add_row(metric, *cells)
    return table


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """All users of a split, in ascending order of their rows. Shapes: U users, lists of K."""

    users: np.ndarray
    """[U] int64."""
    ranks: np.ndarray
    """[U] fp32."""
    lists: np.ndarray
    """[U, K] int64."""
    held_out: np.ndarray
    """[U] int64."""
    has_seen: np.ndarray
    """[U] bool: who knows the held-out item, where seen items are left out."""
    measures: Mapping[str, np.ndarray]
    """[U] fp32 each: what else the search says of itself."""


def _rank_users(
    search: Search,
    batches: Iterable[SequenceBatch],
    empty_batch: SequenceBatch,
    config: EvaluationConfig,
    k: int,
) -> Ranked | None:
    """What was found for all users, on rank 0; None on the other ranks."""
    parts: list[tuple[Tensor, ...]] = []
    measures: list[str] = []
    for batch in in_step(batches, empty_batch, search.process):
        found = search.find(batch, k=k, rank_held_out=True, filter_seen=config.filter_seen)
        measures = list(found.measures)
        nothing = found.ranks.new_zeros(batch.num_users, 0, dtype=torch.int64)
        numbers = torch.stack((found.ranks, *found.measures.values()), dim=1)
        known = _has_seen(batch, config.filter_seen)
        parts.append((batch.user_ids, batch.held_out, found.items if k else nothing, known, numbers))
    own_users = sum(len(part[0]) for part in parts)
    counts = [count for (count,) in exchange_integers([own_users], search.process)]
    if not sum(counts):
        if action := config.held_out_action:
            raise NobodyHeldOutError(
                f"evaluation needs users whose held-out event has the action {action} (evaluation.held-out-action), "
                "and there are none; name another, or build the shards with it among --split-actions"
            )
        raise NobodyHeldOutError(
            "evaluation needs users with a held-out item, and there are none; build the shards from more "
            "events or with another split"
        )
    gathered = [
        gather_on_first(torch.cat(values).cpu(), counts, search.process)
        for values in zip(*parts, strict=True)
    ]
    _check_each_once(gathered[0], search.process)
    if gathered[0] is None:
        return None
    order = gathered[0].argsort()
    users, held_out, lists, has_seen, numbers = (values[order].numpy() for values in gathered)
    return Ranked(
        users=users,
        ranks=numbers[:, 0],
        lists=lists,
        held_out=held_out,
        has_seen=has_seen,
        measures={name: numbers[:, column] for column, name in enumerate(measures, start=1)},
    )


def _has_seen(batch: SequenceBatch, filter_seen: bool) -> Tensor:
    """Whose held-out item is of the known past, where that is left out of the ranking. Shapes: [B] bool."""
    found = torch.zeros(batch.num_users, dtype=torch.bool)
    if filter_seen:
        rows = batch.seen.row_index()
        found[rows[batch.seen.values == batch.held_out[rows]]] = True
    return found


def _check_each_once(users: Tensor | None, process: Process | None) -> None:
    doubled = 0 if users is None else len(users) - len(users.unique())
    ((doubled,), *_) = exchange_integers([doubled], process)
    if doubled:
        raise DataError(
            f"every user must be evaluated once, and {doubled} were evaluated more often; deal the users "
            "of the split to the workers without overlap"
        )


def in_step(batches: Iterable[Batch], empty_batch: Batch, process: Process | None) -> Iterator[Batch]:
    """This rank's batches, then empty ones until all ranks are through, so that collectives match."""
    iterator, freed_memory = iter(batches), FreedMemory()
    while True:
        batch = next(iterator, None)
        if not any(more for (more,) in exchange_integers([int(batch is not None)], process)):
            return
        yield empty_batch if batch is None else batch
        freed_memory.give_back_excess()


def _user_metrics(
    ranked: Ranked, search: Search, items: ItemTable, cutoffs: tuple[int, ...], utilities: Utilities | None
) -> dict[str, np.ndarray]:
    """All that is measured of each user, by name. Shapes: [U] each."""
    per_user = _rank_metrics(ranked.ranks, cutoffs) | _list_metrics(ranked.lists, cutoffs, items)
    met = search.met(ranked.lists, ranked.held_out)
    if met is not None:
        per_user |= {f"condition@{k}": share_met_at(ranked.lists, met, k) for k in cutoffs}
    if utilities is not None:
        of_lists = utilities(ranked.users, ranked.lists, cutoffs)
        per_user |= {f"utility@{k}": values for k, values in of_lists.items()}
    return per_user | ranked.measures


def _rank_metrics(ranks: np.ndarray, cutoffs: tuple[int, ...]) -> dict[str, np.ndarray]:
    per_user = {}
    for k in cutoffs:
        per_user[f"recall@{k}"] = recall_at(ranks, k)
        per_user[f"ndcg@{k}"] = ndcg_at(ranks, k)
    return per_user | {"mrr": reciprocal_rank(ranks)}


def _list_metrics(lists: np.ndarray, cutoffs: tuple[int, ...], items: ItemTable) -> dict[str, np.ndarray]:
    """Novelty, the share of the most popular fifth of the items, and diversity by the cosine of the items' embeddings
    or else of their categories, 0 and 1 each."""
    per_user = {f"novelty@{k}": novelty_at(lists, k, items.train_counts) for k in cutoffs}
    in_head = head_items(items.train_counts)[np.maximum(lists, 0)] & (lists >= 0)
    per_user |= {f"head_share@{k}": share_met_at(lists, in_head, k) for k in cutoffs}
    if items.embeddings is not None:
        # Only the recommended items' vectors are read: the matrix may be far larger than memory.
        shown, lists = _renumbered(lists)
        vectors = unit_vectors(items.embeddings[shown])
    elif items.categories is not None:
        vectors = category_vectors(items.categories)
    else:
        return per_user
    return per_user | {f"diversity@{k}": diversity_at(lists, k, vectors) for k in cutoffs}


def _renumbered(lists: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct items of all lists, and the lists as indices into them; empty slots stay -1."""
    shown = np.unique(lists[lists >= 0])
    return shown, np.where(lists >= 0, np.searchsorted(shown, lists), -1)


def _means(per_user: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in per_user.items()}
