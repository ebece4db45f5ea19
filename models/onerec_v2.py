"""OneRec-V2: a lazy decoder writes the codes of the next item and attends to a context that nobody encodes.

Events become keys and values by two dense layers and a norm, once for all blocks; only the L tokens of a target go
through the decoder. The context has no attention of its own, so one copy of it serves targets after each of a user's
events. Source: OneRec-V2 Technical Report (arXiv 2508.20900). RECONSTRUCTED: rotary positions; the hidden layer of
the context processor and the features it reads (models/layers/user_context.py); more than one target per user, since
the paper trains on the newest impression alone; the size of the dense feed-forward part, 4 x width, with which blocks
have the published numbers of parameters. Deviation: the loss of an item is summed over its codes, and not their mean.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from models.context_generator import ContextGenerator, ContextGeneratorConfig
from models.generator import DecodeState, next_code_loss
from models.kernels.context_attention import ContextLayout
from models.layers.feedforward import FeedForwardConfig
from models.layers.initialise import initialise
from models.layers.lazy_decoder import ContextKeyValues, LazyShape, lazy_decoder
from models.layers.moe import MixtureConfig
from models.layers.shared_prompt_attention import PromptLayout
from models.layers.user_context import ContextConfig
from models.predicted_events import PREDICTED, predicted_targets
from models.recommender import LossSum, StepContext
from models.tables import Rows

Size = Literal["custom", "0.1b", "0.2b", "0.5b", "1b", "2b", "4b", "8b", "4b-a0.5b"]


class OneRecV2(ContextGenerator):
    """A generator whose decoder attends to the context as it is: a copy per user, for all targets."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ContextGeneratorConfig):
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
            self.check()
            _check_shape(self.resolved() if self.size != "custom" else self)

        def resolved(self) -> "OneRecV2.Config":
            """With the shape of the published size, where one is named."""
            return self if self.size == "custom" else replace(self, size="custom", **PUBLISHED[self.size])

        def build(self, **parts: Any) -> "OneRecV2":
            return OneRecV2(self.resolved(), **parts)

    def __init__(self, config: Config, *, max_length: int, **parts: Any):
        shape = decoder_shape(config)
        super().__init__(config, token_dim=shape.context_dim, **parts)
        self.key_values = ContextKeyValues(shape)
        self.decoder = lazy_decoder(shape, list(_feedforwards(config)))
        self.apply(partial(initialise, scale=config.init_scale))

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        paths = self.item_codes[predicted_targets(batch)]
        predicted = batch.supervision[PREDICTED]
        positions = predicted.with_values(predicted.values + 1)
        known = self.context(rows, batch, self.codes)
        layout = ContextLayout.build(known.places, known.since, known.until, positions)
        key_values = self.key_values(known.vectors, known.places.values)
        tokens = torch.cat((self.starts(len(paths)), self.codes(paths[:, :-1])), dim=1)
        hidden = self.decoder(self.scaled(tokens), positions.values, key_values, layout)
        logits = [self.scores(level, hidden[:, level]) for level in range(len(self.code_sizes))]
        return next_code_loss(logits, paths, self.config.label_smoothing)

    def prefill(self, rows: Rows, batch: SequenceBatch) -> DecodeState:
        lengths = batch.items.lengths
        known = self.context(rows, batch, self.codes).last_ones(lengths)
        key_values = self.key_values(known.vectors, known.places.values)
        return self.started(key_values, PromptLayout.build(known.places), lengths)


def decoder_shape(config: OneRecV2.Config) -> LazyShape:
    return LazyShape(
        width=config.width,
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
    if config.num_heads < 1 or config.width % (2 * config.num_heads):
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
