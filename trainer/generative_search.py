"""Search by generating semantic IDs: a beam or draws over the catalogue's paths, or over all paths of codes."""

import sys
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from cluster.errors import ConfigError
from cluster.process import Process
from cluster.seeds import purpose_seed
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from data_streams.semantic_ids import SemanticIdTable
from models.decoding.allowed_items import AllowedItems
from models.decoding.beam_search import BeamSearch, PrefixScorer
from models.decoding.gumbel import GumbelSampling
from models.decoding.sampling import Sampling
from models.decoding.search import Decoded, PathSearch
from models.decoding.space import CatalogueSpace, FreeSpace, PathSpace
from models.decoding.trie import PrefixTrie
from models.generator import DecodeState, Generator
from models.process_reward import PrefixGuide, RewardedHistory
from models.recommender import Recommender
from models.tables import Lookup, Rows
from sharding.item_index import Found, evaluating
from trainer.configuration import PretrainConfig, SearchConfig
from trainer.search import Search, seen_items, without_targets

DRAWS = {"sample": Sampling.Config, "gumbel": GumbelSampling.Config}
"""By the name of `search.method`."""


@dataclass(frozen=True, kw_only=True)
class PrefixReward:
    """A model whose PRM steers searches."""

    model: RewardedHistory
    lookup: Lookup


@runtime_checkable
class SearchedRun(Protocol):
    """What must fit together of a run and of one whose PRM steers it."""

    config: PretrainConfig
    semantic_ids: SemanticIdTable | None
    model: Recommender


def check_prm(source: SearchedRun, run: SearchedRun) -> None:
    """Raises: ConfigError where a run has no PRM, or one that cannot be asked about what another run searches."""
    if not isinstance(source.model, RewardedHistory):
        raise ConfigError(
            f"--search.prm needs a process reward model, and the {type(source.model).__name__} in "
            f"{source.config.run_dir} has none; name a run that has one with --search.prm-run"
        )
    theirs, own = source.semantic_ids.fingerprint, run.semantic_ids.fingerprint
    if theirs != own:
        raise ConfigError(
            f"a process reward model must know the semantic IDs of the run it steers, {own}, and the one in "
            f"{source.config.run_dir} was trained with {theirs}; train one for this table"
        )
    length, longest = source.config.data.max_length, run.config.data.max_length
    if length < longest:
        raise ConfigError(
            f"a process reward model must have been trained with histories as long as those it is asked about, "
            f"data.max-length {longest}, and it was with {length}"
        )


class GenerativeSearch(Search):
    """Every rank decodes for its own users; only lookups are collective: of prompts and, with a PRM, of the candidates
    of each depth, so that ranks make equally many whatever users they have.
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
        allowed: Tensor | None = None,
        reward: PrefixReward | None = None,
        recall_among: int | None = None,
    ):
        """`recall_among` is how many prefixes of each depth HRecall looks at, if not all that are kept.

        Shapes: codes [N, L] int64; allowed [n] item rows.

        Raises: ConfigError for a beam wider than the catalogue.
        """
        self.model, self.lookup, self.trie, self.codes = model, lookup, trie, codes
        self.allowed = allowed if allowed is None else allowed.to(device)
        self.config, self.device, self.process, self.precision = config, device, process, precision
        self.num_items = trie.num_items
        if config.space == "catalogue" and config.width > trie.num_items:
            raise ConfigError(
                f"search.width and search.validation-width must not exceed the {trie.num_items} items of the "
                f"catalogue, got {config.width}; lower them"
            )
        self.reward, self.recall_among = reward, recall_among or config.width
        self.beam = BeamSearch.Config(
            width=config.width,
            earlier_widths=_checked(config.earlier_widths, "earlier-widths", len(model.code_sizes) - 1),
            over=config.over,
            temperature=config.temperature,
            guided_candidates=_num_candidates(config, model),
        )

    @classmethod
    def build(
        cls,
        model: Generator,
        lookup: Lookup,
        codes: Tensor,
        *,
        config: SearchConfig,
        device: torch.device,
        process: Process | None = None,
        precision: torch.dtype = torch.float32,
        **options: Any,
    ) -> "GenerativeSearch":
        """Shapes: codes [N, L] of any integer type, one row per item row; allowed [n] the only rows to be found."""
        codes = codes.long().to(device)
        trie = PrefixTrie.build(codes, model.code_sizes)
        return cls(
            model,
            lookup,
            trie,
            codes,
            config=config,
            device=device,
            process=process,
            precision=precision,
            **options,
        )

    @property
    def longest_list(self) -> int:
        return self.config.width

    def find(self, batch: SequenceBatch, *, k: int, rank_held_out: bool, filter_seen: bool) -> Found:
        if k > self.config.width:
            raise ConfigError(
                f"lists of {k} items need a search.width of at least {k}, got {self.config.width}; widen it, or "
                "ask for fewer"
            )
        targets = batch.held_out.to(self.device) if rank_held_out else None
        seen = seen_items(batch).to(self.device) if filter_seen else None
        if seen is not None and targets is not None:
            seen = without_targets(seen, targets)
        decoded = self._decode(batch, seen)
        items, scores = decoded.existing()
        order = scores
        if self.config.method == "sample":
            items, scores = _once(items, scores)
            # What is drawn first stands first, whatever its probability.
            order = -torch.arange(self.config.width, device=self.device).expand_as(scores).float()
        measures = {} if targets is None else self._prefix_recall(decoded, targets)
        if self.config.space == "free":
            measures["hallucination_rate"] = decoded.hallucination_rates()
        return Found(
            items=_cut(items, k, -1) if k else None,
            scores=_cut(scores, k, float("-inf")) if k else None,
            ranks=None if targets is None else _ranks(items, order, targets),
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
        with evaluating(self.model), self._autocast():
            state = self.model.prefill(self._rows(batch), batch.to(self.device))
            space, width = self._space(batch, seen), self.config.width
            search = self._path_search(batch, state)
            search.check(self.model, space, width, batch.num_users)
            # By user, so that the draws are the same in any batch.
            seeds = batch.user_ids.to(self.device) + (purpose_seed(self.config.seed, "search") >> 8)
            return search.search_from(self.model, state, space, k=width, seeds=seeds)

    def _path_search(self, batch: SequenceBatch, state: DecodeState) -> PathSearch:
        config = self.config
        if config.method == "beam":
            return BeamSearch(self.beam, self._guide(batch, state))
        draws = DRAWS[config.method]
        return draws(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p).build()

    def _guide(self, batch: SequenceBatch, state: DecodeState) -> PrefixScorer | None:
        if self.reward is None:
            return None
        model, lookup = self.reward.model, self.reward.lookup
        if model is self.model:
            return PrefixGuide(model.prm, state.prm_memory, lookup)
        memory = model.prefix_memory(lookup(model.prompt_ids(batch)), batch.to(self.device))
        return PrefixGuide(model.prm, memory, lookup)

    def _rows(self, batch: SequenceBatch) -> Rows:
        return self.lookup(self.model.prompt_ids(batch))

    def _space(self, batch: SequenceBatch, seen: Jagged | None) -> PathSpace:
        allowed = None
        if seen is not None or self.allowed is not None:
            allowed = AllowedItems.build(self.trie, num_users=batch.num_users, allow=self.allowed, deny=seen)
        if self.config.space == "free":
            return FreeSpace(self.trie.code_sizes, self.trie, allowed)
        return CatalogueSpace(self.trie, allowed)

    def _autocast(self) -> torch.autocast:
        is_reduced = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=is_reduced)

    def _prefix_recall(self, decoded: Decoded, targets: Tensor) -> dict[str, Tensor]:
        """HRecall: whether the target's prefix of each depth was among those the beam kept there."""
        found, among = {}, self.recall_among
        for depth, kept in enumerate(decoded.kept, start=1):
            wanted = self._nodes(depth, targets)
            found[f"hrecall{depth}@{among}"] = (kept[:, :among] == wanted[:, None]).any(1).float()
        return found

    def _nodes(self, depth: int, items: Tensor) -> Tensor:
        """Nodes of the searched space above items. Shapes: [B] -> [B]."""
        if self.config.space == "free":
            return FreeSpace(self.trie.code_sizes).find(self.codes[items, :depth])
        return self.trie.item_nodes(depth, items)


def _num_candidates(config: SearchConfig, model: Generator) -> tuple[int, ...]:
    """How many prefixes a PRM scores at each depth; all of them where no generator proposes any."""
    if config.depth_candidates:
        return _checked(config.depth_candidates, "depth-candidates", len(model.code_sizes))
    number = config.candidates[0] if config.candidates else 4 * config.width
    if not config.candidates and not model.proposes_codes:
        number = sys.maxsize
    depths = range(1, len(model.code_sizes) + 1)
    beyond = [depth for depth in config.prm_depths if depth not in depths]
    if beyond:
        raise ConfigError(
            f"search.prm-depths must lie in 1..{len(depths)}, the levels of the semantic IDs, and {beyond[0]} does not"
        )
    widths = (*(config.earlier_widths or (config.width,) * (len(depths) - 1)), config.width)
    chosen = config.prm_depths or depths
    return tuple(number if depth in chosen else width for depth, width in zip(depths, widths, strict=True))


def _checked(numbers: tuple[int, ...], option: str, depths: int) -> tuple[int, ...]:
    if numbers and len(numbers) != depths:
        raise ConfigError(
            f"search.{option} must hold {depths} numbers, one for each such level of the semantic IDs, and it holds "
            f"{len(numbers)}"
        )
    return numbers


def _once(items: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Lists without what stands further ahead already, the others moved up. Shapes: 2 x [B, W] -> 2 x [B, W]."""
    ordered, cells = items.sort(dim=1, stable=True)
    repeats = torch.nn.functional.pad(ordered.diff(dim=1) == 0, (1, 0))
    left_out = torch.zeros_like(repeats).scatter(1, cells, repeats) | (items < 0)
    order = left_out.byte().sort(dim=1, stable=True).indices
    items, scores = items.masked_fill(left_out, -1), scores.masked_fill(left_out, float("-inf"))
    return items.gather(1, order), scores.gather(1, order)


def _ranks(items: Tensor, scores: Tensor, targets: Tensor) -> Tensor:
    """1 + items above the target + half of those tied with it; infinite where it is not in the list.

    Shapes: items and scores [B, W], targets [B] -> [B] fp32.
    """
    hit = items == targets[:, None]
    own = scores.masked_fill(~hit, float("-inf")).amax(1, keepdim=True)
    above, tied = (scores > own).sum(1), (scores == own).sum(1) - 1
    return (1 + above + tied / 2).float().masked_fill(~hit.any(1), float("inf"))


def _cut(slots: Tensor, k: int, empty: int | float) -> Tensor:
    """The first k slots, or more where there are fewer. Shapes: [B, W] -> [B, k]."""
    return torch.nn.functional.pad(slots, (0, max(k - slots.shape[1], 0)), value=empty)[:, :k]
