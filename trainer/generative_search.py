"""Search by generating semantic IDs: a beam over the catalogue's paths, or over all paths of codes."""

import torch
from torch import Tensor

from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.decoding.allowed_items import AllowedItems
from models.decoding.beam_search import BeamSearch
from models.decoding.search import Decoded
from models.decoding.space import CatalogueSpace, FreeSpace, PathSpace
from models.decoding.trie import PrefixTrie
from models.generator import Generator
from models.tables import Lookup, Rows
from sharding.item_index import Found, evaluating
from trainer.configuration import SearchConfig
from trainer.search import Search, seen_items


class GenerativeSearch(Search):
    """Every rank decodes for its own users; only the lookups of prompts are collective.

    Seen items are masked inside a search through the catalogue, and taken out of the result of a free one.
    """

    def __init__(
        self,
        model: Generator,
        lookup: Lookup,
        trie: PrefixTrie,
        codes: Tensor,
        *,
        config: SearchConfig,
        device: torch.device,
        process: Process | None = None,
        precision: torch.dtype = torch.float32,
    ):
        """Shapes: codes [N, L] int64."""
        self.model, self.lookup, self.trie, self.codes = model, lookup, trie, codes
        self.config, self.device, self.process, self.precision = config, device, process, precision
        self.num_items = trie.num_items
        width = config.width if config.space == "free" else min(config.width, trie.num_items)
        self.beam = BeamSearch.Config(width=width, over=config.over).build()

    @staticmethod
    def build(
        model: Generator,
        lookup: Lookup,
        codes: Tensor,
        *,
        config: SearchConfig,
        device: torch.device,
        process: Process | None = None,
        precision: torch.dtype = torch.float32,
    ) -> "GenerativeSearch":
        """Shapes: codes [N, L] of any integer type, one row per item row."""
        codes = codes.long().to(device)
        trie = PrefixTrie.build(codes, model.code_sizes)
        return GenerativeSearch(
            model, lookup, trie, codes, config=config, device=device, process=process, precision=precision
        )

    def find(self, batch: SequenceBatch, *, k: int, rank_held_out: bool, filter_seen: bool) -> Found:
        targets = batch.held_out.to(self.device) if rank_held_out else None
        seen = seen_items(batch).to(self.device) if filter_seen else None
        if seen is not None and targets is not None:
            seen = _without(seen, targets)
        decoded = self._decode(batch, seen)
        items, scores = decoded.existing()
        if seen is not None and self.config.space == "free":
            items, scores = _take_out(items, scores, seen, self.num_items)
        measures = {} if targets is None else self._prefix_recall(decoded, targets)
        if self.config.space == "free":
            measures["hallucination_rate"] = decoded.hallucination_rates()
        return Found(
            items=_cut(items, k, -1) if k else None,
            scores=_cut(scores, k, float("-inf")) if k else None,
            ranks=None if targets is None else _ranks(items, scores, targets),
            measures=measures,
        )

    def score(self, batch: SequenceBatch, candidates: Tensor) -> Tensor:
        """The model's own log-probability of each item's path."""
        candidates = candidates.to(self.device)
        paths = self.codes[candidates.clamp(min=0)].masked_fill(candidates[..., None] < 0, -1)
        with evaluating(self.model), self._autocast():
            rows = self._rows(batch)
            return self.model.log_probabilities(rows, batch.to(self.device), paths).sum(-1)

    def _decode(self, batch: SequenceBatch, seen: Jagged | None) -> Decoded:
        width = self.beam.config.width
        with evaluating(self.model), self._autocast():
            rows = self._rows(batch)
            return self.beam.search(
                self.model, rows, batch.to(self.device), self._space(batch, seen), k=width
            )

    def _rows(self, batch: SequenceBatch) -> Rows:
        return self.lookup(self.model.prompt_ids(batch))

    def _space(self, batch: SequenceBatch, seen: Jagged | None) -> PathSpace:
        if self.config.space == "free":
            return FreeSpace(self.trie.code_sizes, self.trie)
        if seen is None:
            return CatalogueSpace(self.trie)
        return CatalogueSpace(self.trie, AllowedItems.build(self.trie, num_users=batch.num_users, deny=seen))

    def _autocast(self) -> torch.autocast:
        is_reduced = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=is_reduced)

    def _prefix_recall(self, decoded: Decoded, targets: Tensor) -> dict[str, Tensor]:
        """HRecall: whether the target's prefix of each depth was among those the beam kept there."""
        found, width = {}, self.beam.config.width
        for depth, kept in enumerate(decoded.kept, start=1):
            wanted = self._nodes(depth, targets)
            found[f"hrecall{depth}@{width}"] = (kept == wanted[:, None]).any(1).float()
        return found

    def _nodes(self, depth: int, items: Tensor) -> Tensor:
        """Nodes of the searched space above items. Shapes: [B] -> [B]."""
        if self.config.space == "free":
            return FreeSpace(self.trie.code_sizes).find(self.codes[items, :depth])
        return self.trie.item_nodes(depth, items)


def _without(lists: Jagged, targets: Tensor) -> Jagged:
    """Each user's list less one item: a held-out item is ranked even where the user knows it."""
    rows = lists.row_index()
    kept = lists.values != targets[rows]
    counts = torch.zeros_like(lists.lengths).index_add_(0, rows, kept.long())
    return Jagged.from_lengths(lists.values[kept], counts.cpu()).to(targets.device)


def _take_out(items: Tensor, scores: Tensor, seen: Jagged, num_items: int) -> tuple[Tensor, Tensor]:
    """Lists without seen items, the others moved up. Shapes: 2 x [B, W] -> 2 x [B, W]."""
    users = torch.arange(len(items), device=items.device)[:, None]
    known = torch.isin(users * num_items + items, seen.row_index() * num_items + seen.values) | (items < 0)
    order = known.byte().sort(dim=1, stable=True).indices
    items, scores = items.masked_fill(known, -1), scores.masked_fill(known, float("-inf"))
    return items.gather(1, order), scores.gather(1, order)


def _ranks(items: Tensor, scores: Tensor, targets: Tensor) -> Tensor:
    """1 + items above the target + half of those tied with it; infinite where it is not in the list.

    Shapes: items and scores [B, W], targets [B] -> [B] fp32.
    """
    hit = items == targets[:, None]
    own = scores.masked_fill(~hit, float("-inf")).amax(1, keepdim=True)
    above, tied = (scores > own).sum(1), (scores == own).sum(1) - 1
    return (1 + above + tied / 2).float().masked_fill(~hit.any(1), float("inf"))


def _cut(slots: Tensor, k: int, empty: float) -> Tensor:
    """The first k slots, or more where there are fewer. Shapes: [B, W] -> [B, k]."""
    return torch.nn.functional.pad(slots, (0, max(k - slots.shape[1], 0)), value=empty)[:, :k]
