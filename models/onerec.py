"""OneRec: pathways of a user are encoded with full attention, and a decoder with experts writes what comes next.

A target is one item (point-wise) or the first items of a session. The encoder reads for every target what is known
before it: the user, the latest events, the latest ones that were liked, and either all events or a few learned queries
that stand for a lifelong history. Sources: OneRec (arXiv 2502.18965) and OneRec Technical Report (arXiv 2506.13695).
RECONSTRUCTED: positions in the encoder count events back from the target; halves of equal depth where only the sum of
layers is published; more than one target per user; in search, a model of sessions is asked for their first item.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import ConfigError, DataError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.context_generator import ContextGenerator, ContextGeneratorConfig
from models.generator import DecodeState, next_code_loss
from models.kernels.context_attention import NEVER, ContextLayout
from models.known_tokens import COUNTS, KNOWN, with_known_tokens
from models.layers.code_decoder import CodeBlock, CodeDecoder, KeyValues
from models.layers.feedforward import FeedForwardConfig
from models.layers.full_encoder import FullEncoder
from models.layers.initialise import initialise
from models.layers.linear import Linear
from models.layers.moe import MixtureConfig
from models.layers.qformer import QFormer
from models.layers.shared_prompt_attention import PromptLayout
from models.layers.user_context import HISTORY, USER, ContextConfig, Span, codes_of
from models.lifelong_history import KEPT, LifelongConfig, item_vectors, lifelong_span, with_lifelong
from models.predicted_events import PREDICTED, predicted_targets, with_newest
from models.recommender import LossSum, StepContext
from models.session_targets import SESSION, SessionConfig, with_sessions
from models.tables import Rows

MOST_STEPS_WITHOUT_SESSION = 50
Size = Literal["custom", "0.015b", "0.121b", "0.935b", "2.633b"]


class OneRec(ContextGenerator):
    """A generator whose decoder attends to what the encoder makes of each target's context."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ContextGeneratorConfig):
        size: Size = "custom"
        """A published size, which sets width, blocks, heads and the feed-forward parts."""
        width: int = 128
        """Size of the residual streams."""
        num_encoder_blocks: int = 2
        """Blocks of the encoder."""
        num_decoder_blocks: int = 2
        """Blocks of the decoder."""
        num_heads: int = 4
        """Attention heads."""
        encoder_feedforward: FeedForwardConfig | MixtureConfig = field(
            default_factory=lambda: FeedForwardConfig(hidden=384)
        )
        """Feed-forward part of the encoder's blocks."""
        decoder_feedforward: FeedForwardConfig | MixtureConfig = field(
            default_factory=lambda: FeedForwardConfig(hidden=384)
        )
        """Feed-forward part of the decoder's blocks."""
        context: ContextConfig = field(default_factory=ContextConfig)
        """Pathways and what describes events."""
        lifelong: LifelongConfig = field(default_factory=LifelongConfig)
        """How the whole history comes into the encoder."""
        session: SessionConfig = field(default_factory=SessionConfig)
        """What a target is: one item, or a session."""
        targets_per_user: int | None = None
        """Latest targets of each user that are predicted in a step, each with an encoder pass of its own; None takes
        all."""
        dropout: float = 0.3
        """Dropout on features and on what blocks add."""
        label_smoothing: float = 0.0
        """Share of the target's probability that is spread over all codes of the level."""
        init_scale: float = 0.02
        """Standard deviation of the initial rows and weights."""

        def __post_init__(self) -> None:
            self.check()
            shape = self.resolved() if self.size != "custom" else self
            if shape.num_heads < 1 or shape.width % (2 * shape.num_heads):
                raise ConfigError(
                    f"model.width must be a multiple of twice model.num-heads, got {shape.width} and "
                    f"{shape.num_heads}"
                )
            if min(shape.num_encoder_blocks, shape.num_decoder_blocks) < 1:
                raise ConfigError(
                    "model.num-encoder-blocks and model.num-decoder-blocks must be at least 1, got "
                    f"{shape.num_encoder_blocks} and {shape.num_decoder_blocks}"
                )

        @property
        def event_columns(self) -> tuple[str, ...]:
            """Event columns the model reads beside the items."""
            return tuple(dict.fromkeys((*self.context.event_columns, *self.session.event_columns)))

        def resolved(self) -> "OneRec.Config":
            """With the shape of the published size, where one is named."""
            return self if self.size == "custom" else replace(self, size="custom", **PUBLISHED[self.size])

        def build(self, **parts: Any) -> "OneRec":
            return OneRec(self.resolved(), **parts)

    def __init__(self, config: Config, *, max_length: int, **parts: Any):
        super().__init__(config, token_dim=config.width, **parts)
        self.max_length = max_length
        self.session_actions = codes_of(
            "model.session.actions", config.session.actions, parts.get("actions", ())
        )
        # A vector for each pathway and number of events back from the target.
        self.ages = nn.Embedding(len(self.context.pathways) * (max_length + 1), config.width)
        # The first item of a session is a target like any other.
        num_later = config.session.items - 1
        self.later_items = nn.Embedding(num_later, config.width) if num_later else None
        shape = {"width": config.width, "num_heads": config.num_heads, "dropout": config.dropout}
        self.qformer = None
        if config.lifelong.num_queries:
            thin = FeedForwardConfig(hidden=config.lifelong.hidden)
            blocks = list(_feedforwards(thin, config.lifelong.num_blocks, config))
            self.qformer = QFormer(num_queries=config.lifelong.num_queries, feedforwards=blocks, **shape)
        self.encoder = FullEncoder(
            feedforwards=list(_feedforwards(config.encoder_feedforward, config.num_encoder_blocks, config)),
            **shape,
        )
        blocks = _feedforwards(config.decoder_feedforward, config.num_decoder_blocks, config)
        self.decoder = CodeDecoder(
            [EncodedBlock(feedforward=part, **shape) for part in blocks], range(config.num_decoder_blocks)
        )
        self.apply(partial(initialise, scale=config.init_scale))
        self.code_vectors = None
        self.steps_without_session = 0

    def training_batch(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        config = self.config
        if config.session.items == 1:
            batch = with_newest(batch, config.targets_per_user)
        else:
            batch = with_sessions(
                batch, config.session, action_codes=self.session_actions, count=config.targets_per_user
            )
            self._require_sessions(batch)
        return self._with_known(batch)

    def num_targets(self, batch: SequenceBatch) -> int:
        return super().num_targets(batch) * self.config.session.items

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        context_of, sequences = self._encode(rows, batch)
        one_each = torch.arange(sequences.num_rows + 1, device=sequences.offsets.device)
        targets = Jagged(values=torch.zeros_like(one_each[1:]), offsets=one_each, max_length=1)
        always = torch.zeros_like(sequences.values)
        layout = ContextLayout.build(sequences, always, always + NEVER, targets)
        paths = self.item_codes[self._targets(batch)]
        hidden = self.decoder(self._inputs(paths), targets.values, context_of, layout)
        by_item = hidden.unflatten(1, paths.shape[1:]).flatten(0, 1)
        logits = [self.scores(level, by_item[:, level]) for level in range(len(self.code_sizes))]
        return next_code_loss(logits, paths.flatten(0, 1), self.config.label_smoothing)

    def prefill(self, rows: Rows, batch: SequenceBatch) -> DecodeState:
        lengths = batch.items.lengths
        chosen = self._with_known(with_newest(batch.to(torch.device("cpu")), 1)).to(lengths.device)
        context_of, sequences = self._encode(rows, chosen)
        return self.started(context_of, PromptLayout.build(sequences), lengths)

    def _require_sessions(self, batch: SequenceBatch) -> None:
        """Some batches may have none; many in a row mean that nothing is learnt."""
        found = batch.num_users == 0 or super().num_targets(batch) > 0
        self.steps_without_session = 0 if found else self.steps_without_session + 1
        if self.steps_without_session >= MOST_STEPS_WITHOUT_SESSION:
            raise DataError(
                f"there must be sessions of at least {self.config.session.items} events that pass the filter, and "
                f"{MOST_STEPS_WITHOUT_SESSION} batches in a row had none; lower session.items, watched-s or play-s, "
                "raise session.gap-s, or leave session.actions out"
            )

    def _targets(self, batch: SequenceBatch) -> Tensor:
        """Shapes: [N, items of a session] int64."""
        if self.config.session.items == 1:
            return predicted_targets(batch)[:, None]
        return batch.supervision[SESSION].values

    def _inputs(self, paths: Tensor) -> Tensor:
        """What the decoder reads: the start, and all codes but the last. Shapes: [N, m, L] -> [N, m L, D]."""
        num_targets, num_items, num_levels = paths.shape
        codes = self.codes(paths).flatten(1, 2)[:, :-1]
        tokens = self.scaled(torch.cat((self.starts(num_targets), codes), dim=1))
        if self.later_items is None:
            return tokens
        numbers = torch.arange(num_items - 1, device=paths.device)
        marks = F.pad(self.later_items(numbers), (0, 0, 1, 0)).repeat_interleave(num_levels, dim=0)
        return tokens + self.scaled(marks)

    def _with_known(self, batch: SequenceBatch) -> SequenceBatch:
        """With the tokens that the encoder reads for each target. Host side."""
        if self.qformer is not None:
            if self.code_vectors is None:
                self.code_vectors = item_vectors(self.item_codes.cpu().numpy(), self.code_sizes)
            batch = with_lifelong(batch, self.config.lifelong, self.code_vectors)
        spans = self._encoded_spans(batch)
        order = self.context.order(batch.items, spans)
        nothing = batch.items.values[:0]
        since, until = (order.arrange([span[end] for span in spans.values()] or [nothing]) for end in (0, 1))
        return with_known_tokens(batch, order.places, since, until)

    def _encoded_spans(self, batch: SequenceBatch) -> dict[str, Span]:
        """Of the pathways whose tokens the encoder reads as they are; none where the queries stand for all there is."""
        spans = self.context.spans(batch)
        return {name: span for name, span in spans.items() if name != HISTORY or self.qformer is None}

    def _encode(self, rows: Rows, batch: SequenceBatch) -> tuple[list[KeyValues], Jagged]:
        """Encoded tokens of all targets as keys and values of each block, and a row for each target."""
        vectors, spans = self.context.vectors(rows, batch, self.codes), self._encoded_spans(batch)
        predicted, known = batch.supervision[PREDICTED], batch.supervision[KNOWN]
        counts, positions = batch.supervision[COUNTS].values, predicted.values + 1
        order = self.context.order(batch.items, spans)
        index = order.places.offsets[known.row_index()] + known.values
        numbers = torch.arange(len(counts), device=counts.device)
        target = numbers.repeat_interleave(counts, output_size=len(index))
        ages = (positions[target] - order.places.values[index]).clamp(max=self.max_length)
        kinds = order.kinds[index]
        if USER in spans:
            ages = torch.where(kinds == 0, 0, ages)
        hidden = order.arrange([vectors[name] for name in spans] or [vectors[HISTORY][:0]])[index]
        hidden = hidden + self.scaled(self.ages(kinds * (self.max_length + 1) + ages))
        offsets = F.pad(counts.cumsum(0), (1, 0))
        sequences = Jagged(values=index, offsets=offsets, max_length=order.places.max_length)
        if self.qformer is not None:
            queries = self._read_history(vectors[HISTORY], batch)
            hidden, sequences = append_to_rows(hidden, sequences, queries)
        encoded = self.encoder(hidden, sequences)
        return [block.keys_values(encoded) for block in self.decoder.blocks], sequences

    def _read_history(self, events: Tensor, batch: SequenceBatch) -> Tensor:
        """What the queries of each target make of its history. Shapes: [T, D] -> [N, Q, D]."""
        predicted = batch.supervision[PREDICTED]
        positions = predicted.with_values(predicted.values + 1)
        span = lifelong_span(batch.items, batch.supervision[KEPT], self.config.lifelong.max_events)
        places = batch.items.places()
        layout = ContextLayout.build(batch.items, *span, positions)
        return self.qformer(positions.values, events, places, layout)


class EncodedBlock(CodeBlock):
    """Attends to earlier codes, then to the encoded user by keys and values of its own."""

    context_first = False

    def __init__(self, *, width: int, num_heads: int, feedforward: nn.Module, dropout: float):
        super().__init__(
            width=width, num_heads=num_heads, kv_groups=num_heads, feedforward=feedforward, dropout=dropout
        )
        self.key_value = Linear(width, 2 * width, bias=False)

    def keys_values(self, encoded: Tensor) -> KeyValues:
        """Shapes: [S, D]."""
        keys, values = self.key_value(encoded).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        return KeyValues(keys=keys, values=values)


def append_to_rows(tokens: Tensor, rows: Jagged, more: Tensor) -> tuple[Tensor, Jagged]:
    """Every row with as many further tokens behind it. Shapes: tokens [S, D], more [N, Q, D] -> [S + N Q, D]."""
    num_rows, num_more = more.shape[:2]
    numbers = torch.arange(num_rows + 1, device=tokens.device)
    offsets = rows.offsets + num_more * numbers
    own = torch.arange(tokens.shape[0], device=tokens.device) + num_more * rows.row_index()
    behind = offsets[1:, None] - num_more + torch.arange(num_more, device=tokens.device)
    order = torch.cat((own, behind.flatten())).argsort()
    joined = torch.cat((tokens, more.flatten(0, 1).to(tokens.dtype)))[order]
    return joined, Jagged(values=order, offsets=offsets, max_length=rows.max_length + num_more)


def _feedforwards(
    part: FeedForwardConfig | MixtureConfig, count: int, config: OneRec.Config
) -> Iterator[nn.Module]:
    for _ in range(count):
        yield part.build(config.width, init_scale=config.init_scale)


def _published(width: int, num_layers: int, num_heads: int, encoder: Any, decoder: Any) -> dict[str, Any]:
    return {
        "width": width,
        "num_encoder_blocks": num_layers // 2,
        "num_decoder_blocks": num_layers // 2,
        "num_heads": num_heads,
        "encoder_feedforward": encoder,
        "decoder_feedforward": decoder,
    }


_SMALL, _WIDE = FeedForwardConfig(hidden=256), FeedForwardConfig(hidden=2048)
_HALF = MixtureConfig(num_experts=24, top_k=4, hidden=1408)
PUBLISHED: dict[str, dict[str, Any]] = {
    "0.015b": _published(128, 4, 4, _SMALL, _SMALL),
    "0.121b": _published(1024, 8, 8, _WIDE, _WIDE),
    "0.935b": _published(1024, 8, 8, _WIDE, MixtureConfig(num_experts=24, top_k=2, hidden=2816)),
    "2.633b": _published(1024, 24, 8, _HALF, _HALF),
}
"""Shapes of the report. RECONSTRUCTED: experts of half the size in the largest, with which its number is met."""
