"""The process reward model (PRM) of PROMISE: how well each prefix of a semantic ID fits the user.

A prefix is one token: what the encoder begins with for its codes, for whole paths with the item's row, and a row of its
own, so that a candidate costs one query. Blocks of attention to the encoded history and a small network make a score of
it. The prefixes of what was really taken next are told from other prefixes of the catalogue.

Source: PROMISE (Kuaishou, 2026), arXiv 2601.04674. RECONSTRUCTED: pre-norm residuals; the feed-forward part is a
SwiGLU, whose products of candidate and history a map of their sum would have to learn the long way; the network is
D -> D/2 -> 1 with SiLU; codes and items have the vectors of the encoder, through a linear map; a table per depth with a
row per prefix of the catalogue, or two hashed rows where there are more than two million; at depth 1 the code's vector
is all there is. Deviations: the encoder is causal, so that all positions of a user share one pass; the PRM learns at a
few positions drawn per user and step, each of which stands for its share of all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from cluster.errors import ConfigError
from cluster.seeds import purpose_seed
from cluster.user_draws import uniform_of_events
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.coded_history import CodedHistory
from models.decoding.trie import PrefixTrie, pack
from models.kernels.info_nce import info_nce
from models.layers.cross_attention import CrossAttention
from models.layers.dropout import Dropout
from models.layers.feedforward import FeedForward
from models.layers.linear import Linear
from models.layers.norm import RMSNorm
from models.layers.shared_prompt_attention import PromptKeyValues, PromptLayout
from models.objectives.negatives import draw_different
from models.recommender import StepContext
from models.semantic_ids import SemanticIds
from models.tables import Ids, LookedUp, Rows, TableSpec

PLACES = "prm_places"
"""Supervision: the drawn positions, by their place in the user."""
CONTEXT = "prm_context"
"""Supervision: the places of the events that each drawn position may see, one position behind the other."""

ROLES = ("path", "positive", "negative")
"""What prefixes are looked up for: to be scored in a search, or as one of both sides of the loss."""

Memory = tuple[PromptKeyValues, ...]
"""Keys and values of the encoded histories, by block."""


@dataclass(frozen=True, kw_only=True)
class ProcessRewardConfig:
    num_blocks: int = 1
    """Blocks of attention to the history and feed-forward."""
    num_heads: int | None = None
    """Attention heads; left out, a quarter of the encoder's."""
    width: int | None = None
    """Size of its tokens and rows; left out, that of the encoder. Every candidate of every position is one token, so
    that this decides what a step costs."""
    feedforward_width: int = 256
    """Gated hidden size of the feed-forward part."""
    dropout: float = 0.1
    """Dropout on what blocks add."""
    num_negatives: int = 256
    """Different prefixes of the catalogue drawn per step and depth, shared by all users; all where there are fewer."""
    positions: int | None = 4
    """Positions drawn per user and step that the PRM learns at; None takes all. With a small part of them it learns far
    more slowly than the generator beside it, and then chooses worse than it."""
    most_rows: int = 2_000_000
    """Prefixes of one depth beyond which their rows are hashed."""
    hash_rows: int = 2**20
    """Rows that are then kept."""

    def __post_init__(self) -> None:
        if self.num_negatives < 1 or (self.positions is not None and self.positions < 1):
            raise ConfigError(
                "the PRM needs at least one negative and one position per user, and got "
                f"num-negatives {self.num_negatives} and positions {self.positions}"
            )


class PathReward(nn.Module):
    """Scores prefixes against encoded histories."""

    def __init__(self, config: ProcessRewardConfig, encoder: CodedHistory, semantic_ids: SemanticIds):
        super().__init__()
        # Not a part of this module: it is saved and trained as its own.
        self._encoder = (encoder,)
        self.config, self.init_scale = config, encoder.config.init_scale
        self.width = config.width or encoder.config.width
        # On the host, where ids are made.
        self.item_paths = semantic_ids.codes
        self.trie = PrefixTrie.build(semantic_ids.codes, semantic_ids.code_sizes)
        self.code_sizes = tuple(semantic_ids.code_sizes)
        num_heads = config.num_heads or max(encoder.config.num_heads // 4, 1)
        self.embed = Linear(encoder.config.width, self.width, bias=False)
        self.blocks = nn.ModuleList(
            ScoringBlock(config, self.width, num_heads, encoder.config.width)
            for _ in range(config.num_blocks)
        )
        self.final_norm = RMSNorm(self.width)
        self.hidden = Linear(self.width, self.width // 2)
        # Scores are only compared with each other: a bias would have no gradient but rounding.
        self.output = Linear(self.width // 2, 1, bias=False)

    def initialise(self) -> None:
        """To be called behind whatever initialises all layers of a model.

        By fan-in: with the small weights that suit the generator, scores and their gradients vanish at first and the
        PRM stays far behind it.
        """
        for module in (*self.blocks.modules(), self.embed, self.hidden, self.output):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    @property
    def encoder(self) -> CodedHistory:
        return self._encoder[0]

    @property
    def depths(self) -> range:
        return range(1, len(self.code_sizes) + 1)

    def tables(self) -> list[TableSpec]:
        """A table of prefixes for each depth from 2 on; its last row stands for prefixes of no item."""
        return [
            TableSpec(
                name=f"path_{depth}",
                num_rows=self.trie.num_nodes(depth) + 1,
                dim=self.width,
                features=tuple(f"{role}_{depth}" for role in ROLES),
                init_scale=self.init_scale,
                placement="row_wise",
                hash_rows=self.config.hash_rows if self._is_hashed(depth) else None,
                rows_are_items=False,
            )
            for depth in self.depths[1:]
        ]

    def path_ids(self, prefixes: Tensor, role: str = "path") -> Ids:
        """The rows of prefixes; none at depth 1. Host side. Shapes: [..., depth] -> [n]."""
        depth = prefixes.shape[-1]
        if depth == 1:
            return {}
        nodes = self.trie.find(prefixes).flatten()
        ids = {f"{role}_{depth}": self._path_rows(prefixes, nodes)}
        if depth == self.depths[-1] and self.encoder.config.item_rows:
            ids[f"{role}_item"] = self.trie.items[self.trie.first_place[depth][nodes.clamp(min=0)]].long()
        return ids

    def _path_rows(self, prefixes: Tensor, nodes: Tensor) -> Tensor:
        """Shapes: prefixes [..., depth], nodes [n] -> [n]."""
        depth = prefixes.shape[-1]
        if self._is_hashed(depth):
            return pack(prefixes.clamp(min=0), self.code_sizes[:depth]).flatten()
        return torch.where(nodes < 0, self.trie.num_nodes(depth), nodes)

    def tokens(self, prefixes: Tensor, rows: Rows, role: str = "path") -> Tensor:
        """The one token of each prefix. Shapes: [..., depth] -> [..., D]."""
        depth = prefixes.shape[-1]
        known = self._encoded(prefixes, rows.get(f"{role}_item") if depth == self.depths[-1] else None)
        tokens = self.embed(known.flatten(0, -2)).unflatten(0, known.shape[:-1])
        if depth > 1:
            found = rows[f"{role}_{depth}"]
            own = found.rows
            if not self._is_hashed(depth):
                own = own * (found.ids < self.trie.num_nodes(depth))[:, None]
            tokens = tokens + own.view_as(tokens) * self.width**0.5
        return tokens

    def _encoded(self, prefixes: Tensor, items: LookedUp | None) -> Tensor:
        """What the encoder begins with for codes and the items of whole paths. Shapes: [..., depth] -> [..., D]."""
        own = None
        if items is not None:
            has_path = (self.encoder.item_codes[items.ids].view_as(prefixes) == prefixes).all(
                -1, keepdim=True
            )
            own = self.encoder.own_vectors(items).unflatten(0, prefixes.shape[:-1]) * has_path
        return self.encoder.vectors(prefixes.clamp(min=0), own)

    def remember(self, states: Tensor, layout: PromptLayout, events: Tensor | None = None) -> Memory:
        """Keys and values of histories. Shapes: states [T, D], events [E] indices into them."""
        return tuple(block.attention.remember(states, layout, events) for block in self.blocks)

    def score(self, tokens: Tensor, memory: Memory, queries: Tensor | None = None) -> Tensor:
        """C prefixes for each history; the queries of the first block may be given, where prefixes repeat.

        Shapes: tokens [S, C, D], queries [S, C, heads, D / heads] -> [S, C] fp32.
        """
        hidden = tokens
        for block, of_block in zip(self.blocks, memory, strict=True):
            hidden = block(hidden, block.queries(hidden) if queries is None else queries, of_block)
            queries = None
        inner = nn.functional.silu(self.hidden(self.final_norm(hidden.flatten(0, 1))))
        return self.output(inner).float().view(hidden.shape[:2])

    def draw_negatives(self, context: StepContext) -> dict[int, Tensor]:
        """Different prefixes of the catalogue by depth, the same on every rank, all equally likely.

        Shapes: [N, depth] each, on the host.
        """
        drawn = {}
        for depth in self.depths:
            seed = purpose_seed(context.seed, "prefix negatives", context.step, depth)
            generator = torch.Generator().manual_seed(seed)
            nodes = draw_different(self.trie.num_nodes(depth), self.config.num_negatives, generator)
            drawn[depth] = self.trie.paths(depth, nodes)
        return drawn

    def training_ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        """Rows of the positive prefixes at the drawn positions, and of the negatives. Host side."""
        places = batch.supervision[PLACES]
        taken = self.item_paths[batch.targets[batch.items.offsets[places.row_index()] + places.values]]
        ids: dict[str, Tensor] = {}
        for depth, negatives in self.draw_negatives(context).items():
            ids |= self.path_ids(taken[:, :depth], "positive") | self.path_ids(negatives, "negative")
        return ids

    def loss(
        self, states: Tensor, paths: Tensor, rows: Rows, batch: SequenceBatch, context: StepContext
    ) -> Mapping[int, Tensor]:
        """InfoNCE of each depth, summed over all positions that the drawn ones stand for.

        Shapes: states [T, D] after each event, paths [T, L] of what followed -> scalars.
        """
        places = batch.supervision[PLACES]
        users = places.row_index()
        drawn = batch.items.offsets[users] + places.values
        histories = _drawn_histories(batch)
        memory = self.remember(states, PromptLayout.build(histories), histories.values)
        share = 1.0
        if self.config.positions is not None:
            share = batch.items.lengths[users] / self.config.positions
        candidates, queries, same = [], [], []
        for depth, negatives in self.draw_negatives(context).items():
            negatives, own = negatives.to(states.device), paths[drawn, :depth]
            positive = self.tokens(own, rows, "positive")[:, None]
            others = self.tokens(negatives, rows, "negative")[None]
            for tokens in (positive, others):
                # Negatives are the same for all, and so is what they ask first.
                asked = self.blocks[0].queries(tokens)
                candidates.append(tokens.expand(len(drawn), -1, -1))
                queries.append(asked.expand(len(drawn), *asked.shape[1:]))
            sizes = self.code_sizes[:depth]
            same.append(pack(own, sizes)[:, None] == pack(negatives, sizes))
        scores = self.score(torch.cat(candidates, dim=1), memory, torch.cat(queries, dim=1))
        by_depth = scores.split([1 + mask.shape[1] for mask in same], dim=1)
        return {
            depth: (info_nce(of_depth, mask) * share).sum()
            for depth, of_depth, mask in zip(self.depths, by_depth, same, strict=True)
        }

    def _is_hashed(self, depth: int) -> bool:
        return self.trie.num_nodes(depth) > self.config.most_rows


class ScoringBlock(nn.Module):
    """Candidates look at the history, each by itself, and pass a feed-forward part."""

    def __init__(self, config: ProcessRewardConfig, width: int, num_heads: int, memory_width: int):
        super().__init__()
        self.attention_norm, self.feedforward_norm = RMSNorm(width), RMSNorm(width)
        self.attention = CrossAttention(width, num_heads, memory_width)
        self.feedforward = FeedForward(width, config.feedforward_width)
        self.dropout = Dropout(config.dropout)

    def queries(self, hidden: Tensor) -> Tensor:
        """Shapes: [..., D] -> [..., heads, D / heads]."""
        return self.attention.queries(self.attention_norm(hidden))

    def forward(self, hidden: Tensor, queries: Tensor, memory: PromptKeyValues) -> Tensor:
        """Shapes: hidden [S, C, D], queries [S, C, heads, D / heads] -> [S, C, D]."""
        hidden = hidden + self.dropout(self.attention(queries, memory))
        flat = hidden.flatten(0, 1)
        return (flat + self.dropout(self.feedforward(self.feedforward_norm(flat)))).view_as(hidden)


def draw_positions(batch: SequenceBatch, context: StepContext, positions: int | None) -> SequenceBatch:
    """Choose what the PRM learns at; by the seed, the step and the user alone. Host side only."""
    lengths = batch.items.lengths
    if positions is None:
        places = batch.items.with_values(batch.items.places())
    else:
        seed = purpose_seed(context.seed, "prm positions", context.step)
        users = np.repeat(batch.user_ids.numpy(), positions)
        numbers = np.tile(np.arange(positions), batch.num_users)
        of_user = lengths.repeat_interleave(positions)
        uniform = torch.from_numpy(uniform_of_events(seed, users, numbers))
        drawn = torch.minimum((uniform * of_user).long(), of_user - 1)
        places = Jagged.from_lengths(drawn, torch.full_like(lengths, positions))
    seen = places.values + 1
    histories = Jagged.from_lengths(torch.zeros(int(seen.sum()), dtype=torch.int64), seen)
    per_user = torch.zeros_like(lengths).index_add_(0, places.row_index(), seen)
    context_places = Jagged.from_lengths(histories.places(), per_user)
    return replace(batch, supervision={**batch.supervision, PLACES: places, CONTEXT: context_places})


def _drawn_histories(batch: SequenceBatch) -> Jagged:
    """The events that each drawn position may see, as indices into the batch's. Shapes: S rows."""
    places, context = batch.supervision[PLACES], batch.supervision[CONTEXT]
    ends = (places.values + 1).cumsum(0)
    return Jagged(
        values=batch.items.offsets[context.row_index()] + context.values,
        offsets=torch.cat((ends.new_zeros(1), ends)),
        max_length=batch.items.max_length,
    )
