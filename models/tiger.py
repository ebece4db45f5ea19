"""TIGER: an encoder reads the codes of the history, a decoder writes those of the next item.

Source: TIGER (arXiv 2305.05065): user token by hashing, 4 + 4 blocks, all prefixes of a user as training samples.
RECONSTRUCTED: all prefixes; learned positions by item instead of T5's relative biases, LayerNorm and biases, GELU,
attention over the root of the head size, scores over the codes of a level alone instead of the joint vocabulary; AdamW
with a cosine instead of an inverse square root. Prefixes are those of the newest `max_length` events: of a longer
history the older targets are left out, and the first ones kept see less before them.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.generator import DecodeState, Generator, next_code_loss
from models.kernels.length_buckets import BucketLayout, bucket_layout
from models.kernels.masked_attention import masked_attention, prefix_masks
from models.layers.code_embedding import CodeEmbedding
from models.layers.dropout import Dropout
from models.layers.initialise import initialise
from models.layers.linear import Linear
from models.layers.shared_prompt_attention import PromptKeyValues, PromptLayout, shared_prompt_attention
from models.layers.transformer import DecoderBlock, FeedForward, Memory, TransformerBlock
from models.recommender import LossSum, StepContext
from models.semantic_ids import SemanticIds
from models.tables import Ids, Rows, TableSpec, hash_ids

PREFIXES = "prefixes"


class Tiger(Generator):
    """A generator over a user token and L tokens per event; it looks up no table."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        needs_semantic_ids: ClassVar[bool] = True
        """Whether `build` is to be given the catalogue's semantic IDs."""
        has_own_objective: ClassVar[bool] = True
        """Whether the loss is the model's own."""

        width: int = 128
        """Size of the residual stream."""
        num_encoder_blocks: int = 4
        """Blocks over the codes of the history."""
        num_decoder_blocks: int = 4
        """Blocks over the codes of the next item."""
        num_heads: int = 6
        """Attention heads per block."""
        head_width: int = 64
        """Size of a head; heads together may be wider than the residual stream."""
        feedforward_width: int = 1024
        """Hidden size of the feed-forward part."""
        dropout: float = 0.1
        """Dropout on the input and on what blocks add."""
        user_tokens: int = 2000
        """Users are hashed into so many tokens, which their histories begin with."""
        encoder: Literal["bidirectional", "causal"] = "bidirectional"
        """What a token of the history sees: all of the history, as published, so that each prefix of a user is encoded
        by itself; or what comes before it, so that a user is encoded once and each target attends to its prefix."""
        item_sums: bool = True
        """Each code of the history also carries the sum of its item's codes, so a token knows its whole item from the
        first block on, and the first level is learnt several times earlier. RECONSTRUCTED: not so as published."""
        label_smoothing: float = 0.0
        """Share of the target's probability that is spread over all codes of the level."""
        init_scale: float = 0.02
        """Standard deviation of the initial weights."""

        def __post_init__(self) -> None:
            sizes = (self.user_tokens, self.num_encoder_blocks, self.num_decoder_blocks)
            if min(sizes) < 1:
                raise ConfigError(
                    "model.user-tokens, model.num-encoder-blocks and model.num-decoder-blocks must be at least 1, got "
                    f"{', '.join(map(str, sizes))}"
                )

        def build(self, **parts: Any) -> "Tiger":
            return Tiger(self, **parts)

    def __init__(
        self,
        config: Config,
        *,
        num_items: int,
        max_length: int,
        item_feature_dim: int,
        semantic_ids: SemanticIds,
    ):
        super().__init__()
        self.config = config
        self.code_sizes = semantic_ids.code_sizes
        self.register_buffer("item_codes", semantic_ids.codes, persistent=False)
        self.codes = CodeEmbedding(self.code_sizes, config.width)
        self.users = nn.Embedding(config.user_tokens, config.width)
        self.positions = nn.Embedding(max_length, config.width)
        self.depths = nn.Embedding(len(self.code_sizes), config.width)
        self.input_dropout = Dropout(config.dropout)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.heads = nn.ModuleList(Linear(config.width, size) for size in self.code_sizes)
        self.apply(partial(initialise, scale=config.init_scale))

    @property
    def is_causal(self) -> bool:
        return self.config.encoder == "causal"

    def tables(self) -> list[TableSpec]:
        return []

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        return {}

    def prompt_ids(self, batch: SequenceBatch) -> Ids:
        return {}

    def training_batch(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        """With every prefix written out where each is encoded by itself."""
        if self.is_causal:
            return batch
        return replace(batch, supervision={**batch.supervision, PREFIXES: all_prefixes(batch.items)})

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        paths = self.item_codes[batch.targets]
        memory = self._whole_users(batch) if self.is_causal else self._every_prefix(batch)
        return next_code_loss(self.teacher_forced(memory, paths), paths, self.config.label_smoothing)

    def teacher_forced(self, memory: Memory, paths: Tensor) -> list[Tensor]:
        """Scores of every level of the target of each position. Shapes: paths [T, L] -> L x [T, K_l]."""
        num_targets, num_levels = paths.shape
        depths = self.depths(torch.arange(num_levels, device=paths.device))
        start = depths.new_zeros(num_targets, 1, depths.shape[1])
        given = torch.cat((start, self.codes(paths[:, :-1])), dim=1)
        tokens = self.input_dropout(self._scaled(given + depths)).flatten(0, 1)
        offsets = torch.arange(num_targets + 1, device=paths.device) * num_levels
        layout = bucket_layout(Jagged(values=tokens, offsets=offsets, max_length=num_levels))
        hidden = self.decoder(tokens, layout, memory).unflatten(0, (num_targets, num_levels))
        return [head(hidden[:, level]) for level, head in enumerate(self.heads)]

    def _whole_users(self, batch: SequenceBatch) -> Memory:
        """Each user encoded once; a target sees its prefix."""
        history = History.build(batch.items, len(self.code_sizes))
        layout = bucket_layout(history.tokens)
        states = self.encoder(self._embed(batch.user_ids, batch.items, history), layout)
        return PrefixMemory(states=states, history=history, layout=layout, masks=history.prefix_masks(layout))

    def _every_prefix(self, batch: SequenceBatch) -> Memory:
        """Each prefix of each user encoded by itself."""
        lengths = batch.items.places() + 1
        prefixes = Jagged(
            values=batch.supervision[PREFIXES].values,
            offsets=torch.cat((lengths.new_zeros(1), lengths.cumsum(0))),
            max_length=batch.items.max_length,
        )
        states, layout = self._encode(batch.user_ids[batch.items.row_index()], prefixes)
        return PromptMemory(states=states, layout=layout, num_levels=len(self.code_sizes))

    def _encode(self, user_ids: Tensor, items: Jagged) -> tuple[Tensor, PromptLayout]:
        """Shapes: user_ids [R], a row of items for each -> [E, D]."""
        history = History.build(items, len(self.code_sizes))
        layout = PromptLayout.build(history.tokens)
        masks = None if self.is_causal else history.whole_masks(layout.cells)
        return self.encoder(self._embed(user_ids, items, history), layout.cells, masks), layout

    def _embed(self, user_ids: Tensor, items: Jagged, history: "History") -> Tensor:
        """Shapes: -> [E, D]."""
        codes = self.codes(self.item_codes[items.values])
        if self.config.item_sums:
            codes = codes + codes.sum(dim=1, keepdim=True)
        codes = codes + self.positions(items.places())[:, None]
        users = self.users(hash_ids(user_ids, self.config.user_tokens))
        return self.input_dropout(self._scaled(torch.cat((users, codes.flatten(0, 1)))[history.order]))

    def _scaled(self, vectors: Tensor) -> Tensor:
        return vectors * self.config.width**0.5

    def prefill(self, rows: Rows, batch: SequenceBatch) -> DecodeState:
        states, layout = self._encode(batch.user_ids, batch.items)
        memory = tuple(block.remember_memory(states, layout) for block in self.decoder.blocks)
        start = self.depths(torch.zeros(batch.num_users, 1, dtype=torch.int64, device=states.device))
        hidden, suffix = self.decoder.extend(self._scaled(start), memory, (None,) * len(memory))
        return DecodeState(
            last_hidden=hidden[:, 0],
            lengths=torch.ones(batch.num_users, dtype=torch.int64, device=states.device),
            prompt=memory,
            suffix=suffix,
        )

    def step(
        self, state: DecodeState, level: int, codes: Tensor | None, parents: Tensor | None
    ) -> tuple[Tensor, DecodeState]:
        if level == 0:
            return self.heads[0](state.last_hidden)[:, None], state
        state = state.reorder(parents)
        given = self.codes(codes[..., None], level - 1)[..., 0, :] + self.depths(
            torch.full_like(codes, level)
        )
        hidden, suffix = self.decoder.extend(self._scaled(given), state.prompt, state.suffix)
        scores = self.heads[level](hidden.flatten(0, 1)).unflatten(0, codes.shape)
        return scores, state.with_suffix(suffix)


class Encoder(nn.Module):
    """Blocks on top of each other and a last norm."""

    def __init__(self, config: Tiger.Config):
        super().__init__()
        self.blocks = nn.ModuleList(
            TransformerBlock(**_shape(config)) for _ in range(config.num_encoder_blocks)
        )
        self.final_norm = nn.LayerNorm(config.width)

    def forward(self, hidden: Tensor, layout: BucketLayout, masks: list[Tensor] | None = None) -> Tensor:
        """Shapes: hidden [E, D] -> [E, D]."""
        for block in self.blocks:
            hidden = block(hidden, layout, masks)
        return self.final_norm(hidden)


class Decoder(nn.Module):
    """Blocks with cross-attention on top of each other and a last norm."""

    def __init__(self, config: Tiger.Config):
        super().__init__()
        self.blocks = nn.ModuleList(DecoderBlock(**_shape(config)) for _ in range(config.num_decoder_blocks))
        self.final_norm = nn.LayerNorm(config.width)

    def forward(self, hidden: Tensor, layout: BucketLayout, memory: Memory) -> Tensor:
        """Shapes: hidden [N, D] -> [N, D]."""
        for block in self.blocks:
            hidden = block(hidden, layout, memory)
        return self.final_norm(hidden)

    def extend(
        self, hidden: Tensor, memory: tuple[PromptKeyValues, ...], before: tuple
    ) -> tuple[Tensor, tuple]:
        """One more token for each of W prefixes per user. Shapes: hidden [B, W, D] -> [B, W, D]."""
        suffixes = []
        for block, keys, suffix in zip(self.blocks, memory, before, strict=True):
            hidden, suffix = block.extend_decoded(hidden, keys, suffix)
            suffixes.append(suffix)
        return self.final_norm(hidden), tuple(suffixes)


def _shape(config: Tiger.Config) -> dict[str, Any]:
    return {
        "width": config.width,
        "num_heads": config.num_heads,
        "head_width": config.head_width,
        "feedforward": FeedForward(config.width, config.feedforward_width),
        "dropout": config.dropout,
    }


@dataclass(frozen=True, kw_only=True)
class History:
    """How user tokens and the codes of items lie: a row is the user and then L codes for each item.

    Shapes: R rows, T items of all rows, E = R + T L tokens.

    Example: rows of 2 and 1 items with 2 levels are u a a b b, v c c; their codes lie at 1 2 3 4 6 7.
    """

    tokens: Jagged
    """[E] the number of each token's item in its row, from 1; 0 for the user."""
    order: Tensor
    """[E] int64: where each token stands in all users, followed by all codes."""
    place_of_code: Tensor
    """[T * L] int64: where each code lies among the tokens."""
    num_levels: int

    @staticmethod
    def build(items: Jagged, num_levels: int) -> "History":
        device, num_rows = items.offsets.device, items.num_rows
        offsets = items.offsets * num_levels + torch.arange(num_rows + 1, device=device)
        levels = torch.arange(num_levels, device=device)
        rows, numbers = items.row_index(), items.places() + 1
        codes = torch.arange(len(rows), device=device)[:, None] * num_levels + levels
        place_of_code = (codes + rows[:, None] + 1).flatten()
        order = torch.empty(num_rows + codes.numel(), dtype=torch.int64, device=device)
        order[offsets[:-1]] = torch.arange(num_rows, device=device)
        order[place_of_code] = num_rows + codes.flatten()
        item_number = torch.zeros_like(order).index_copy(
            0, place_of_code, numbers.repeat_interleave(num_levels, output_size=codes.numel())
        )
        length = items.max_length * num_levels + 1
        return History(
            tokens=Jagged(values=item_number, offsets=offsets, max_length=length),
            order=order,
            place_of_code=place_of_code,
            num_levels=num_levels,
        )

    def prefix_masks(self, layout: BucketLayout) -> list[Tensor]:
        """At the codes of an item, the user and all codes up to this item; nothing at the user."""
        numbers = self.tokens.values
        return prefix_masks((numbers > 0) * (1 + numbers * self.num_levels), layout)

    def whole_masks(self, layout: BucketLayout) -> list[Tensor]:
        """Everything in the row."""
        return prefix_masks(self.tokens.lengths[self.tokens.row_index()], layout)


@dataclass(frozen=True, kw_only=True)
class PrefixMemory(Memory):
    """Whole users: the L queries for the item after item number i see the user's tokens up to that item.

    There are as many queries as codes in the histories, so they lie where those lie.
    """

    history: History
    layout: BucketLayout
    masks: list[Tensor]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        place = self.history.place_of_code
        at_tokens = torch.zeros_like(keys, dtype=queries.dtype).index_copy(0, place, queries)
        return masked_attention(at_tokens, keys, values, self.masks, self.layout)[place]


@dataclass(frozen=True, kw_only=True)
class PromptMemory(Memory):
    """A row for each target: its L queries see all of it."""

    layout: PromptLayout
    num_levels: int

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        memory = PromptKeyValues.build(keys, values, self.layout)
        by_row = queries.unflatten(0, (queries.shape[0] // self.num_levels, self.num_levels))
        return shared_prompt_attention(by_row, memory).flatten(0, 1)


def all_prefixes(items: Jagged) -> Jagged:
    """All prefixes of each row, the shortest first, one behind the other; meant for the host side.

    Example: rows (3, 5), (7) are (3, 3, 5), (7).
    """
    lengths = items.places() + 1
    starts = items.offsets[items.row_index()]
    prefixes = Jagged.from_lengths(torch.zeros(int(lengths.sum()), dtype=torch.int64), lengths)
    values = items.values[starts[prefixes.row_index()] + prefixes.places()]
    return Jagged.from_lengths(values, items.lengths * (items.lengths + 1) // 2)
