"""Search under a condition on the wanted items, such as a category: the model is asked, or its list is filtered."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.item_conditions import NO_CONDITION, ItemConditions
from sharding.item_index import Found
from trainer.configuration import EvaluationConfig, PretrainConfig
from trainer.search import RetrievalSearch, Search, seen_items, without_targets


def model_conditions(config: PretrainConfig) -> dict[str, Any]:
    """What a model that knows conditions is built with beside the rest; nothing for others."""
    column = getattr(config.model, "condition_column", "")
    if not column:
        return {}
    conditions = ItemConditions.load(config.data.path, column)
    return {"condition_table": conditions.table, "condition_names": tuple(conditions.names)}


def load_conditions(config: PretrainConfig) -> ItemConditions | None:
    """The conditions that evaluation and serving are to use; None where they use none.

    Raises: ConfigError where the model cannot be asked, or no item meets a condition.
    """
    chosen, trained = config.evaluation, getattr(config.model, "condition_column", "")
    if chosen.condition == "none":
        if chosen.conditions:
            raise ConfigError(
                f"evaluation.conditions {', '.join(chosen.conditions)} need evaluation.condition attention (for a "
                "model trained with model.condition-column) or filter"
            )
        return None
    column = chosen.condition_column or trained
    if not column:
        raise ConfigError(
            "evaluation.condition needs evaluation.condition-column, the item column of the conditions, such as "
            "categories"
        )
    if chosen.condition == "attention" and column != trained:
        raise ConfigError(
            f"evaluation.condition attention needs a model trained with model.condition-column {column}, this one has "
            f"{trained or 'none'}; say --evaluation.condition filter, or train one: grail pretrain climber-pilot-cgsa"
        )
    conditions = ItemConditions.load(config.data.path, column)
    for name in chosen.conditions:
        conditions.find(name)
    return conditions


def conditional_search(
    search: Search, conditions: ItemConditions, config: EvaluationConfig
) -> "ConditionalSearch":
    """The search that `evaluation.condition` asks for."""
    form = AskingSearch if config.condition == "attention" else FilteringSearch
    return form(search, conditions, config)


class ConditionalSearch(Search):
    """Looks for items that meet one of the given conditions, or the narrowest one of the held-out item."""

    def __init__(self, search: Search, conditions: ItemConditions, config: EvaluationConfig):
        self.search, self.conditions, self.config = search, conditions, config
        self.num_items, self.process = search.num_items, search.process
        self.fixed = [conditions.find(name) for name in config.conditions]

    def met(self, lists: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Shapes: lists [U, K], held_out [U] -> [U, K]."""
        if not self.fixed:
            return self.conditions.met(lists, self.conditions.narrowest(held_out))
        return np.any([self.conditions.met(lists, np.full(len(lists), one)) for one in self.fixed], axis=0)

    def wanted(self, batch: SequenceBatch) -> Tensor:
        """Conditions of each user. Shapes: [B, P] int64, -1 for none."""
        if self.fixed:
            return torch.tensor(self.fixed).expand(batch.num_users, -1)
        if batch.held_out is None:
            raise ConfigError(
                "a condition must be named where no held-out item tells one: say --condition "
                f"{self.conditions.column}=VALUE"
            )
        return torch.from_numpy(self.conditions.narrowest(batch.held_out.numpy()).astype(np.int64))[:, None]


class AskingSearch(ConditionalSearch):
    """Asks the model under each condition, in one pass, and merges the lists by score."""

    search: RetrievalSearch

    def find(self, batch: SequenceBatch, *, k: int, rank_held_out: bool, filter_seen: bool) -> Found:
        """A held-out item takes the best of its ranks under the conditions."""
        wanted = self.wanted(batch)
        times, index = wanted.shape[1], self.search.index
        queries = self.search.queries_under(batch, wanted).flatten(0, 1)
        exclude = seen_items(batch).repeat_rows(times).to(index.device) if filter_seen else None
        targets = batch.held_out.repeat_interleave(times).to(index.device) if rank_held_out else None
        found = index.find(queries, exclude, k=k, targets=targets)
        ranks = None if found.ranks is None else found.ranks.unflatten(0, wanted.shape).amin(1)
        if not k or times == 1:
            return Found(items=found.items, scores=found.scores, ranks=ranks)
        items, scores = _merge(*(part.unflatten(0, wanted.shape) for part in (found.items, found.scores)))
        return Found(items=items, scores=scores, ranks=ranks)

    def score(self, batch: SequenceBatch, candidates: Tensor) -> Tensor:
        queries = self.search.queries_under(batch, self.wanted(batch))
        return torch.stack([self.search.score_with(part, candidates) for part in queries.unbind(1)]).amax(0)


class FilteringSearch(ConditionalSearch):
    """Takes the items that do not meet the condition out of a longer list of the model (post-filtering)."""

    def find(self, batch: SequenceBatch, *, k: int, rank_held_out: bool, filter_seen: bool) -> Found:
        """A held-out item that is not in the longer list, or does not meet the condition, has an infinite rank.

        Raises: ConfigError where the longer list is longer than a beam is wide.
        """
        wide = self._wide(k)
        if rank_held_out and filter_seen:
            batch = replace(batch, seen=without_targets(seen_items(batch), batch.held_out))
        found = self.search.find(batch, k=wide, rank_held_out=False, filter_seen=filter_seen)
        lists, wanted = found.items.cpu().numpy(), self.wanted(batch).numpy()
        kept = np.zeros(lists.shape, dtype=bool)
        for column in wanted.T:
            kept |= self.conditions.met(lists, column)
        order = np.argsort(~kept, axis=1, kind="stable")
        kept = torch.from_numpy(np.take_along_axis(kept, order, axis=1))
        items = torch.from_numpy(np.take_along_axis(lists, order, axis=1)).masked_fill(~kept, -1)
        scores = found.scores.cpu().gather(1, torch.from_numpy(order)).masked_fill(~kept, float("-inf"))
        ranks = None
        if rank_held_out:
            hit = items == batch.held_out[:, None]
            ranks = (hit.int().argmax(1) + 1).float().masked_fill(~hit.any(1), float("inf"))
        return Found(
            items=items[:, :k] if k else None,
            scores=scores[:, :k] if k else None,
            ranks=ranks,
            measures={name: values.cpu() for name, values in found.measures.items()},
        )

    def _wide(self, k: int) -> int:
        """The length of the list that is filtered."""
        longest = max(k, *self.config.cutoffs)
        wide = min(self.config.filter_from * longest, self.num_items)
        if wide > self.search.longest_list:
            raise ConfigError(
                f"filtering looks at {wide} items, evaluation.filter-from {self.config.filter_from} times the longest "
                f"list of {longest}, and needs a search.width of as many, got {self.search.longest_list}; widen it, or "
                "lower evaluation.filter-from"
            )
        return wide

    def score(self, batch: SequenceBatch, candidates: Tensor) -> Tensor:
        meets = np.zeros(candidates.shape, dtype=bool)
        for column in self.wanted(batch).numpy().T:
            meets |= self.conditions.met(candidates.cpu().numpy(), column)
        scores = self.search.score(batch, candidates)
        return scores.masked_fill(~torch.from_numpy(meets).to(scores.device), float("-inf"))


def _merge(items: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The best of P lists, each item once. Shapes: [B, P, k] each -> [B, k]."""
    k = items.shape[2]
    order = scores.flatten(1).argsort(dim=1, descending=True, stable=True)
    items, scores = items.flatten(1).gather(1, order), scores.flatten(1).gather(1, order)
    # Sorted by item, the first of equal ones stands best, since the sort is stable.
    by_item = items.argsort(dim=1, stable=True)
    ordered = items.gather(1, by_item)
    repeated = torch.zeros_like(items, dtype=torch.bool)
    repeated.scatter_(1, by_item[:, 1:], ordered[:, 1:] == ordered[:, :-1])
    scores = scores.masked_fill(repeated | (items == NO_CONDITION), float("-inf"))
    best, place = scores.topk(k, dim=1)
    return items.gather(1, place).masked_fill(best == float("-inf"), -1), best
