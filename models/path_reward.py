"""The process reward model (PRM) of PROMISE: how well each prefix of a semantic ID fits the user.

A prefix is one token: what the encoder begins with for its codes, for whole paths with the item's row, and a row of its
own, so that a candidate costs one query. Blocks of attention to the encoded history and a small network make a score of
it. The prefixes of what was really taken next are told from other prefixes of the catalogue.

Source: PROMISE (Kuaishou, 2026), arXiv 2601.04674. RECONSTRUCTED: pre-norm residuals; the feed-forward part is a
SwiGLU, whose products of candidate and history a map of their sum would have to learn the long way; the network is
D -> D/2 -> 1 with SiLU; codes and items have the vectors of the encoder, through a linear map; a table per depth with a
row per prefix of the catalogue, or two hashed rows where there are more than two million; at depth 1 the code's vector
is all there is. Deviations: the encoder is causal, so that all positions of a user share one pass; the PRM learns at a
few positions drawn per user and step, each of which stands for its share of all. With `likeness_negatives` a score has
a second term, which is ours: the likeness of user and prefix (`models.prefix_likeness`), told from thousands of
prefixes at all positions. It is held fixed in the loss of the whole score, which so learns what it misses.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cluster.errors import ConfigError
from cluster.seeds import purpose_seed
from data_streams.batch import SequenceBatch
from models.coded_history import CodedHistory
from models.decoding.trie import PrefixTrie, pack
from models.drawn_positions import drawn_events, drawn_histories, drawn_share
from models.kernels.info_nce import info_nce
from models.layers.cross_attention import CrossAttention
from models.layers.dropout import Dropout
from models.layers.feedforward import FeedForward
from models.layers.linear import Linear, without_autocast
from models.layers.norm import RMSNorm
from models.layers.shared_prompt_attention import PromptKeyValues, PromptLayout
from models.objectives.negatives import draw_different
from models.prefix_candidates import Candidates, Contrast
from models.prefix_likeness import PrefixLikeness, likeness
from models.recommender import StepContext
from models.semantic_ids import SemanticIds
from models.tables import Ids, LookedUp, Rows, TableSpec

ROLES = ("path", "positive", "negative")
"""What prefixes are looked up for: to be scored in a search, or as one of both sides of the loss."""


def negatives_name(depth: int) -> str:
    """In `SequenceBatch.shared`: the step's negatives of a depth. Shapes: [N, depth]."""
    return f"prm_negatives_{depth}"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Encoded histories of S users, as a PRM looks at them."""

    blocks: tuple[PromptKeyValues, ...]
    """Keys and values, by block of attention."""
    user_vectors: Tensor | None
    """[S, D] what prefixes are compared with, where the score has a likeness."""


@dataclass(frozen=True, kw_only=True)
class ProcessRewardConfig:
    """Sizes of a PRM, and the positions and prefixes it learns from."""

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
    """Positions drawn per user and step that attention learns at; None takes all. Without a likeness, which learns at
    all of them, a PRM of few positions learns far more slowly than the generator beside it and then chooses worse."""
    likeness_negatives: int | None = None
    """Prefixes drawn per step and depth that the likeness of user and prefix is told from, at all positions, and which
    then is a part of the score; all where there are fewer. `num_negatives` are the first of them. Left out, there is no
    likeness, as in the paper."""
    likeness_temperature: float = 0.07
    """The likeness is a cosine over it."""
    most_rows: int = 2_000_000
    """Prefixes of one depth beyond which their rows are hashed."""
    hash_rows: int = 2**20
    """Rows that are then kept."""

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ConfigError(
                f"num-blocks of the PRM must be at least 1, since only they read the history, got {self.num_blocks}"
            )
        # Half of the width is the hidden size of the network that makes the score.
        for name, least in (("num_heads", 1), ("width", 2), ("feedforward_width", 1), ("hash_rows", 1)):
            if (given := getattr(self, name)) is not None and given < least:
                raise ConfigError(
                    f"{name.replace('_', '-')} of the PRM must be at least {least}, got {given}"
                )
        if self.num_negatives < 1 or (self.positions is not None and self.positions < 1):
            raise ConfigError(
                "the PRM needs at least one negative and one position per user, and got "
                f"num-negatives {self.num_negatives} and positions {self.positions}"
            )
        if self.likeness_temperature <= 0:
            raise ConfigError(
                f"likeness-temperature of the PRM must be above 0, and got {self.likeness_temperature}"
            )
        if self.likeness_negatives is not None and self.likeness_negatives < self.num_negatives:
            raise ConfigError(
                "likeness-negatives of the PRM must be at least its num-negatives "
                f"{self.num_negatives}, which are the first of them; got {self.likeness_negatives}"
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
        self.likeness = None
        if config.likeness_negatives is not None:
            self.likeness = PrefixLikeness(
                width=encoder.config.width,
                row_width=self.width if len(self.code_sizes) > 1 else None,
                temperature=config.likeness_temperature,
            )

    def initialise(self) -> None:
        """To be called behind whatever initialises all layers of a model.

        By fan-in: with the small weights that suit the generator, scores and their gradients vanish at first and the
        PRM stays far behind it.
        """
        parts = (self.blocks, self.embed, self.hidden, self.output, self.likeness)
        for module in (module for part in parts if part is not None for module in part.modules()):
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

    def candidates(self, prefixes: Tensor, rows: Rows, role: str = "path") -> Candidates:
        """What prefixes begin with. Shapes: [..., depth] -> [..., W] and [..., D]."""
        depth, shape = prefixes.shape[-1], prefixes.shape[:-1]
        known = self._encoded(prefixes, rows.get(f"{role}_item") if depth == self.depths[-1] else None)
        known = known.flatten(0, -2)
        tokens, of_prefix = self.embed(known), None
        if depth > 1:
            of_prefix = self._prefix_rows(rows[f"{role}_{depth}"], depth) * self.width**0.5
            tokens = tokens + of_prefix
        vectors = None
        if self.likeness is not None:
            vectors = self.likeness.prefixes(known, of_prefix).unflatten(0, shape)
        return Candidates(tokens=tokens.unflatten(0, shape), vectors=vectors)

    def _prefix_rows(self, found: LookedUp, depth: int) -> Tensor:
        """Rows of prefixes; zero for those of no item, unless rows are hashed. Shapes: [n, W]."""
        if self._is_hashed(depth):
            return found.rows
        return found.rows * (found.ids < self.trie.num_nodes(depth))[:, None]

    def _encoded(self, prefixes: Tensor, items: LookedUp | None) -> Tensor:
        """What the encoder begins with for codes and the items of whole paths. Shapes: [..., depth] -> [..., D]."""
        own = None
        if items is not None:
            has_path = (self.encoder.item_codes[items.ids].view_as(prefixes) == prefixes).all(
                -1, keepdim=True
            )
            own = self.encoder.own_vectors(items).unflatten(0, prefixes.shape[:-1]) * has_path
        return self.encoder.vectors(prefixes.clamp(min=0), own)

    def remember(self, states: Tensor, layout: PromptLayout, last: Tensor) -> Memory:
        """Whole histories as candidates look at them.

        Shapes: states [T, D], last [S] where each history's latest event stands among them.
        """
        return Memory(
            blocks=self._key_values(states, layout),
            user_vectors=None if self.likeness is None else self.likeness.users(states[last]),
        )

    def _key_values(
        self, states: Tensor, layout: PromptLayout, events: Tensor | None = None
    ) -> tuple[PromptKeyValues, ...]:
        """Of all states, or of some of them in another order. Shapes: states [T, D], events [E] indices into them."""
        return tuple(block.attention.remember(states, layout, events) for block in self.blocks)

    def score(self, candidates: Candidates, memory: Memory) -> Tensor:
        """C prefixes for each history. Shapes: candidates [S, C] -> [S, C] fp32."""
        tokens = candidates.tokens
        scores = self._attended(tokens, self.blocks[0].queries(tokens), memory.blocks)
        if memory.user_vectors is None:
            return scores
        return scores + likeness(memory.user_vectors, candidates.vectors)

    def _attended(self, tokens: Tensor, queries: Tensor, memory: tuple[PromptKeyValues, ...]) -> Tensor:
        """What attention to the history says; given the queries of the first block.

        Shapes: tokens [S, C, W], queries [S, C, heads, W / heads] -> [S, C] fp32.
        """
        hidden = self.blocks[0](tokens, queries, memory[0])
        for block, of_block in zip(self.blocks[1:], memory[1:], strict=True):
            hidden = block(hidden, block.queries(hidden), of_block)
        inner = nn.functional.silu(self.hidden(self.final_norm(hidden.flatten(0, 1))))
        # In bf16, scores of candidates that a beam has to choose among would be the same.
        with without_autocast(inner):
            return self.output(inner.float()).view(hidden.shape[:2])

    def draw_negatives(self, context: StepContext) -> dict[int, Tensor]:
        """Different prefixes of the catalogue by depth, the same on every rank, all equally likely, in random order.

        Shapes: [N, depth] each, on the host.
        """
        wanted = self.config.num_negatives
        if self.config.likeness_negatives is not None:
            wanted = self.config.likeness_negatives
        drawn = {}
        for depth in self.depths:
            seed = purpose_seed(context.seed, "prefix negatives", context.step, depth)
            generator = torch.Generator().manual_seed(seed)
            nodes = draw_different(self.trie.num_nodes(depth), wanted, generator)
            drawn[depth] = self.trie.paths(depth, nodes)
        return drawn

    def with_negatives(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        """With the negatives of the step, so that they are drawn once and sent ahead with the batch. Host side."""
        drawn = {negatives_name(depth): found for depth, found in self.draw_negatives(context).items()}
        return replace(batch, shared={**batch.shared, **drawn})

    def training_ids(self, batch: SequenceBatch) -> Ids:
        """Rows of the prefixes that were taken, where the loss asks for them, and of the negatives. Host side."""
        taken = self.item_paths[batch.targets]
        if self.likeness is None:
            taken = taken[drawn_events(batch)]
        ids: dict[str, Tensor] = {}
        for depth in self.depths:
            negatives = batch.shared[negatives_name(depth)]
            ids |= self.path_ids(taken[:, :depth], "positive") | self.path_ids(negatives, "negative")
        return ids

    def loss(self, states: Tensor, paths: Tensor, rows: Rows, batch: SequenceBatch) -> dict[str, Tensor]:
        """InfoNCE of each depth, summed over all positions, by name.

        Shapes: states [T, D] after each event, paths [T, L] of what followed -> scalars.
        """
        drawn = drawn_events(batch)
        taken = paths[drawn] if self.likeness is None else paths
        contrasts = [
            self._contrast(batch.shared[negatives_name(depth)], taken[:, :depth], rows)
            for depth in self.depths
        ]
        if self.likeness is None:
            return self._score_losses(contrasts, None, states, batch)
        user_vectors = self.likeness.users(states)
        few = [contrast.at(drawn, self.config.num_negatives) for contrast in contrasts]
        losses = self._score_losses(few, user_vectors.detach()[drawn], states, batch)
        for depth, contrast in zip(self.depths, contrasts, strict=True):
            losses[f"likeness_loss_level_{depth}"] = contrast.likeness_loss(user_vectors)
        return losses

    def _contrast(self, negatives: Tensor, taken: Tensor, rows: Rows) -> Contrast:
        """What was taken and what it is told from. Shapes: negatives [N, depth], taken [T, depth]."""
        sizes = self.code_sizes[: taken.shape[-1]]
        return Contrast(
            positive=self.candidates(taken, rows, "positive"),
            negatives=self.candidates(negatives, rows, "negative"),
            ids=pack(taken, sizes),
            negative_ids=pack(negatives, sizes),
        )

    def _score_losses(
        self, contrasts: list[Contrast], user_vectors: Tensor | None, states: Tensor, batch: SequenceBatch
    ) -> dict[str, Tensor]:
        """InfoNCE of whole scores at the drawn positions, each of which stands for its share of all.

        Shapes: contrasts of [S] positions, user_vectors [S, D], states [T, D].
        """
        histories = drawn_histories(batch)
        memory = self._key_values(states, PromptLayout.build(histories), histories.values)
        tokens, queries = [], []
        for contrast in contrasts:
            for side in (contrast.positive.tokens[:, None], contrast.negatives.tokens[None]):
                # Negatives are the same for all, and so is what they ask first.
                asked = self.blocks[0].queries(side)
                tokens.append(side.expand(len(contrast.ids), -1, -1))
                queries.append(asked.expand(len(contrast.ids), *asked.shape[1:]))
        scores = self._attended(torch.cat(tokens, dim=1), torch.cat(queries, dim=1), memory)
        if user_vectors is not None:
            scores = scores + torch.cat(
                [contrast.fixed_likeness(user_vectors) for contrast in contrasts], dim=1
            )
        by_depth = scores.split([1 + len(contrast.negative_ids) for contrast in contrasts], dim=1)
        share = drawn_share(batch, self.config.positions)
        return {
            f"prm_loss_level_{depth}": (info_nce(of_depth, contrast.same) * share).sum()
            for depth, of_depth, contrast in zip(self.depths, by_depth, contrasts, strict=True)
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
