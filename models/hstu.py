"""HSTU: layers of pointwise attention and gating over the user's items, without softmax or feed-forward part.

Source: Zhai et al., Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
Recommendations (2024), and its published code. Deviations: no padding exists; the time bias of a pair takes the
time of the query's own event, not that of the event to be predicted, which is not known when recommending; a pair's
distance counts one way only, since no event sees a later one. Not there: ranking, with actions between the items, and
M-FALCON, which scores candidates in micro-batches behind one cached history.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from models.item_sequence import ItemSequenceConfig, ItemSequenceModel
from models.kernels.pointwise_attention import NUM_TIME_BUCKETS, EventPairs, PairBias, pointwise_attention
from models.layers.dropout import Dropout
from models.layers.heads import checked_heads
from models.layers.linear import Linear, matmul_dtype
from models.recommender import StepContext
from models.stochastic_length import shorten_histories

TIME = "timestamp_s"
NORM_EPSILON = 1e-6


class HSTU(ItemSequenceModel):
    """A retriever by the states behind its last layer, as they are: no norm follows."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ItemSequenceConfig):
        num_heads: int = 1
        """Attention heads per layer."""
        attention_dim: int | None = None
        """Size of a head's queries and keys; None takes width / heads."""
        value_dim: int | None = None
        """Size of a head's values and gates; None takes width / heads."""
        position_bias: bool = True
        """Add a learnt bias by the number of events between two events."""
        time_bias: bool = True
        """Add a learnt bias by the logarithm of the time between two events; needs events with times."""
        stochastic_length: float | None = None
        """Alpha in (1, 2]: histories longer than max_length^(alpha/2) are mostly cut to that many random events in
        training; None trains on whole histories."""

        @property
        def head_width(self) -> int:
            """What a size of heads is that is not given."""
            return self.width // checked_heads(self.num_heads, self.width)

        @property
        def event_columns(self) -> tuple[str, ...]:
            """Event columns the model reads beside the items."""
            return (TIME,) if self.time_bias else ()

        def build(self, **parts: Any) -> "HSTU":
            return HSTU(self, **parts)

    def __init__(self, config: Config, **parts: Any):
        super().__init__(config, **parts)
        if config.stochastic_length is not None and not 1 < config.stochastic_length <= 2:
            raise ConfigError(f"model.stochastic-length must lie in (1, 2], got {config.stochastic_length}")
        self.blocks = nn.ModuleList(Block(config, self.max_length) for _ in range(config.num_blocks))
        nn.init.normal_(self.positions.weight, std=config.init_scale)
        if config.item_features:
            nn.init.normal_(self.feature_projection.weight, std=config.init_scale)

    def training_batch(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        alpha = self.config.stochastic_length
        if alpha is None:
            return batch
        return shorten_histories(batch, context, alpha=alpha, max_length=self.max_length)

    def encode_events(self, hidden: Tensor, batch: SequenceBatch) -> Tensor:
        pairs = EventPairs.build(batch.items, batch.features[TIME] if self.config.time_bias else None)
        for block in self.blocks:
            hidden = block(hidden, pairs)
        return hidden


class Block(nn.Module):
    """X + f(dropout(U * norm(A V))) with [U, V, Q, K] = SiLU(norm(X) W) and A = SiLU(Q K^T + bias) / max_length."""

    def __init__(self, config: HSTU.Config, max_length: int):
        super().__init__()
        self.num_heads, self.max_length = config.num_heads, max_length
        self.attention_dim = config.attention_dim or config.head_width
        self.value_dim = config.value_dim or config.head_width
        per_head = 2 * self.attention_dim + self.value_dim
        self.projection = Linear(config.width, config.num_heads * per_head, bias=False)
        self.gate = Linear(config.width, config.num_heads * self.value_dim, bias=False)
        self.output = Linear(config.num_heads * self.value_dim, config.width)
        self.dropout = Dropout(config.dropout)
        self.pair_bias = PairBiases(config, max_length)
        nn.init.normal_(self.projection.weight, std=config.init_scale)
        nn.init.normal_(self.gate.weight, std=config.init_scale)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden: Tensor, pairs: EventPairs) -> Tensor:
        """Shapes: hidden [T, D] -> [T, D]."""
        # Two layers read it, and autocast would round it for each.
        normalised = _norm(hidden).to(matmul_dtype(hidden))
        by_distance, by_time = self.pair_bias()
        packed = F.silu(self.projection(normalised)).unflatten(-1, (self.num_heads, -1))
        attended = pointwise_attention(
            packed,
            self.attention_dim,
            pairs,
            max_length=self.max_length,
            bias=PairBias(by_distance=by_distance, by_time=by_time),
        )
        gated = F.silu(self.gate(normalised)) * _norm(attended.flatten(1))
        return hidden + self.output(self.dropout(gated))


class PairBiases(nn.Module):
    """The learnt biases of one layer; a module of its own, so that ZeRO-3 gathers them while it is called.

    It returns a plain tuple, by distance and by time, since ZeRO-3 does not look into other objects.
    """

    def __init__(self, config: HSTU.Config, max_length: int):
        super().__init__()
        scale = config.init_scale
        self.by_distance = _weights(max_length, scale) if config.position_bias else None
        self.by_time = _weights(NUM_TIME_BUCKETS, scale) if config.time_bias else None

    def forward(self) -> tuple[Tensor | None, Tensor | None]:
        copy = lambda weights: None if weights is None else weights.clone()  # noqa: E731
        return copy(self.by_distance), copy(self.by_time)


def _weights(size: int, scale: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(size) * scale)


def _norm(values: Tensor) -> Tensor:
    return F.layer_norm(values, values.shape[-1:], eps=NORM_EPSILON)
