"""OneRec-V2: a lazy decoder writes the codes of the next item and attends to a context that nobody encodes.

Events become keys and values by two dense layers and a norm, once for all blocks; only the L tokens of a target go
through the decoder. The context has no attention of its own, so one copy of it serves targets after each of a user's
events. Source: OneRec-V2 Technical Report (arXiv 2508.20900). RECONSTRUCTED: rotary positions; the hidden layer of
the context processor and the features it reads (models/layers/user_context.py); more than one target per user, since
the paper trains on the newest impression alone; the size of the dense feed-forward part, 4 x width, with which blocks
have the published numbers of parameters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from models.generator import DecodeState, Generator, next_code_loss
from models.kernels.context_attention import ContextLayout
from models.layers.code_embedding import CodeEmbedding
from models.layers.feedforward import FeedForwardConfig
from models.layers.lazy_decoder import LazyDecoder, LazyShape
from models.layers.linear import Linear
from models.layers.moe import MixtureConfig
from models.layers.shared_prompt_attention import PromptLayout
from models.layers.user_context import ContextConfig, UserContext
from models.predicted_events import PREDICTED, check_targets_per_user, predicted_targets, with_newest
from models.recommender import LossSum, StepContext
from models.semantic_ids import SemanticIds
from models.tables import Ids, Rows, TableSpec

Size = Literal["custom", "0.1b", "0.2b", "0.5b", "1b", "2b", "4b", "8b", "4b-a0.5b"]


class OneRecV2(Generator):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        needs_semantic_ids: ClassVar[bool] = True
        has_own_objective: ClassVar[bool] = True

        size: Size = "custom"
        """A published size, which sets width, num-blocks, num-heads and the feed-forward parts."""
        width: int = 192
        """Size of the residual stream of the decoder."""
        num_blocks: int = 4
        """Blocks of the decoder."""
        num_heads: int = 4
        """Heads of queries."""
        feedforward: FeedForwardConfig | MixtureConfig = field(
            default_factory=lambda: FeedForwardConfig(hidden=512)
        )
        """Feed-forward part of the blocks."""
        num_dense_blocks: int = 0
        """First blocks that have `dense-feedforward` in the place of `feedforward`."""
        dense_feedforward: FeedForwardConfig = field(default_factory=lambda: FeedForwardConfig(hidden=512))
        """Feed-forward part of the first blocks, where the others have experts."""
        kv_layers: int = 1
        """Keys and values that are made of the context; neighbouring blocks share them (L_kv)."""
        kv_split: Literal[1, 2] = 1
        """2 gives values vectors of their own, with 1 keys are values too (S_kv)."""
        kv_groups: int | None = None
        """Heads of keys and values, each shared by as many heads of queries (G_kv); None is one for each head."""
        context: ContextConfig = field(default_factory=ContextConfig)
        """The context processor."""
        targets_per_user: int | None = None
        """Latest events of each user that are predicted in a step, each from those before it; None predicts all, the
        paper 1."""
        dropout: float = 0.3
        """Dropout on features and on what blocks add."""
        label_smoothing: float = 0.0
        """Share of the target's probability that is spread over all codes of the level."""
        init_scale: float = 0.02
        """Standard deviation of the initial rows and weights."""

        def __post_init__(self) -> None:
            shape = self.resolved() if self.size != "custom" else self
            check_targets_per_user(self.targets_per_user)
            _check_shape(shape)

        @property
        def event_columns(self) -> tuple[str, ...]:
            """Event columns the model reads beside the items."""
            return self.context.event_columns

        @property
        def needs_actions(self) -> bool:
            """Whether `build` is to be given the names of the codes in the column `action`."""
            return "action" in self.event_columns

        @property
        def item_features(self) -> bool:
            """Whether items come with their feature vectors."""
            return self.context.item_features

        def resolved(self) -> "OneRecV2.Config":
            """With the shape of the published size, where one is named."""
            return self if self.size == "custom" else replace(self, size="custom", **PUBLISHED[self.size])

        def build(self, **parts: Any) -> "OneRecV2":
            return OneRecV2(self.resolved(), **parts)

    def __init__(
        self,
        config: Config,
        *,
        num_items: int,
        item_feature_dim: int,
        semantic_ids: SemanticIds,
        actions: Sequence[str] = (),
        max_length: int,
    ):
        super().__init__()
        self.config = config
        self.code_sizes = semantic_ids.code_sizes
        self.uses_item_features = config.context.item_features
        shape = decoder_shape(config)
        self.register_buffer("item_codes", semantic_ids.codes, persistent=False)
        self.codes = CodeEmbedding(self.code_sizes, config.width)
        self.start = nn.Embedding(1, config.width)
        self.context = UserContext(
            config.context,
            width=config.width,
            dim=shape.context_dim,
            dropout=config.dropout,
            num_items=num_items,
            item_feature_dim=item_feature_dim,
            semantic_ids=semantic_ids,
            actions=actions,
            init_scale=config.init_scale,
        )
        self.decoder = LazyDecoder(shape, list(_feedforwards(config)))
        self.norms = nn.ModuleList(nn.RMSNorm(config.width) for _ in self.code_sizes)
        self.heads = nn.ModuleList(Linear(config.width, size, bias=False) for size in self.code_sizes)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_scale)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def tables(self) -> list[TableSpec]:
        return self.context.tables()

    def training_batch(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        return with_newest(batch, self.config.targets_per_user)

    def num_targets(self, batch: SequenceBatch) -> int:
        return batch.supervision[PREDICTED].values.shape[0]

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        return self.prompt_ids(batch)

    def prompt_ids(self, batch: SequenceBatch) -> Ids:
        return self.context.ids(batch)

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        paths = self.item_codes[predicted_targets(batch)]
        predicted = batch.supervision[PREDICTED]
        positions = predicted.with_values(predicted.values + 1)
        known = self.context(rows, batch, self.codes)
        layout = ContextLayout.build(known.places, known.since, known.until, positions)
        key_values = self.decoder.context(known.vectors, known.places.values)
        tokens = self._scaled(torch.cat((self._starts(len(paths)), self.codes(paths[:, :-1])), dim=1))
        hidden = self.decoder(tokens, positions.values, key_values, layout)
        logits = [self._scores(level, hidden[:, level]) for level in range(len(self.code_sizes))]
        return next_code_loss(logits, paths, self.config.label_smoothing)

    def prefill(self, rows: Rows, batch: SequenceBatch) -> DecodeState:
        lengths = batch.items.lengths
        known = self.context(rows, batch, self.codes).last_ones(lengths)
        layout = PromptLayout.build(known.places)
        prompt = self.decoder.remember(self.decoder.context(known.vectors, known.places.values), layout)
        nothing = [None] * self.config.num_blocks
        tokens = self._scaled(self._starts(batch.num_users))
        hidden, suffix = self.decoder.extend(tokens, lengths, prompt, nothing)
        return DecodeState(last_hidden=hidden[:, 0], lengths=lengths, prompt=prompt, suffix=tuple(suffix))

    def step(
        self, state: DecodeState, level: int, codes: Tensor | None, parents: Tensor | None
    ) -> tuple[Tensor, DecodeState]:
        if level == 0:
            return self._scores(0, state.last_hidden)[:, None], state
        state = state.reorder(parents)
        tokens = self._scaled(self.codes(codes[..., None], level - 1)[..., 0, :])
        hidden, suffix = self.decoder.extend(tokens, state.lengths, state.prompt, state.suffix)
        scores = self._scores(level, hidden.flatten(0, 1)).unflatten(0, codes.shape)
        return scores, state.with_suffix(suffix)

    def _starts(self, count: int) -> Tensor:
        """Shapes: [count, 1, D]."""
        return self.start(torch.zeros(count, 1, dtype=torch.int64, device=self.item_codes.device))

    def _scaled(self, tokens: Tensor) -> Tensor:
        """As large as what blocks add to it, or the codes would hardly be heard."""
        return tokens * self.config.width**0.5

    def _scores(self, level: int, hidden: Tensor) -> Tensor:
        """Shapes: [n, D] -> [n, K]."""
        return self.heads[level](self.norms[level](hidden))


def decoder_shape(config: OneRecV2.Config) -> LazyShape:
    return LazyShape(
        width=config.width,
        num_blocks=config.num_blocks,
        num_heads=config.num_heads,
        kv_layers=config.kv_layers,
        kv_split=config.kv_split,
        kv_groups=config.kv_groups or config.num_heads,
        dropout=config.dropout,
    )


def _feedforwards(config: OneRecV2.Config) -> Iterator[nn.Module]:
    for number in range(config.num_blocks):
        part = config.dense_feedforward if number < config.num_dense_blocks else config.feedforward
        yield part.build(config.width, init_scale=config.init_scale)


def _check_shape(config: OneRecV2.Config) -> None:
    groups = config.kv_groups or config.num_heads
    if config.width % (2 * config.num_heads):
        raise ConfigError(
            f"model.width must be a multiple of twice model.num-heads, since heads are rotated in pairs, got "
            f"{config.width} and {config.num_heads}"
        )
    if not 1 <= groups or config.num_heads % groups:
        raise ConfigError(
            f"model.kv-groups must divide the {config.num_heads} heads, got {groups}; use one of "
            f"{[part for part in range(1, config.num_heads + 1) if config.num_heads % part == 0]}"
        )
    if not 1 <= config.kv_layers <= config.num_blocks:
        raise ConfigError(
            f"model.kv-layers must lie in 1..{config.num_blocks}, the number of blocks, got {config.kv_layers}"
        )
    if not 0 <= config.num_dense_blocks <= config.num_blocks:
        raise ConfigError(
            f"model.num-dense-blocks must lie in 0..{config.num_blocks}, got {config.num_dense_blocks}"
        )


def _dense(width: int, num_blocks: int, num_heads: int) -> dict[str, Any]:
    return {
        "width": width,
        "num_blocks": num_blocks,
        "num_heads": num_heads,
        "feedforward": FeedForwardConfig(hidden=4 * width),
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "0.1b": _dense(640, 12, 10),
    "0.2b": _dense(896, 12, 14),
    "0.5b": _dense(1408, 14, 11),
    "1b": _dense(1792, 18, 14),
    "2b": _dense(2304, 22, 18),
    "4b": _dense(2944, 26, 23),
    "8b": _dense(3584, 34, 28),
    "4b-a0.5b": {
        **_dense(1408, 14, 11),
        "feedforward": MixtureConfig(num_experts=53, num_shared=1, top_k=3, hidden=1408),
        "num_dense_blocks": 2,
        "dense_feedforward": FeedForwardConfig(hidden=4 * 1408),
    },
}
"""Shapes of the report. Those of its mixture's width, blocks and heads are RECONSTRUCTED: those of 0.5b."""
