"""SASRec: a causal transformer over the user's items that predicts the next one at every position.

Source: Kang and McAuley, Self-Attentive Sequential Recommendation (2018), with the softmax objectives that later
work found to be decisive. Deviations: keys and values are normalised like the queries (plain pre-norm), their
projections have no bias (that of the keys would have no effect), no padding exists, and positions count from the oldest
event, where left-padded inputs give the newest one always the same.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from data_streams.batch import SequenceBatch
from models.item_sequence import ItemSequenceConfig, ItemSequenceModel
from models.kernels.jagged_attention import jagged_attention
from models.kernels.length_buckets import BucketLayout, bucket_layout
from models.layers.dropout import Dropout
from models.layers.heads import checked_heads
from models.layers.initialise import initialise
from models.layers.linear import Linear


class SASRec(ItemSequenceModel):
    """A retriever by the normed states of its last block."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ItemSequenceConfig):
        num_heads: int = 2
        """Attention heads per block."""
        feedforward_width: int | None = None
        """Hidden size of the feed-forward part; None takes the width, as the paper does."""

        def build(self, **parts: Any) -> "SASRec":
            return SASRec(self, **parts)

    def __init__(self, config: Config, **parts: Any):
        super().__init__(config, **parts)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.final_norm = nn.LayerNorm(config.width)
        self.apply(partial(initialise, scale=config.init_scale))

    def encode_events(self, hidden: Tensor, batch: SequenceBatch) -> Tensor:
        layout = bucket_layout(batch.items)
        for block in self.blocks:
            hidden = block(hidden, layout)
        return self.final_norm(hidden)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: SASRec.Config):
        super().__init__()
        hidden = config.feedforward_width or config.width
        self.num_heads = checked_heads(config.num_heads, config.width)
        self.attention_norm = nn.LayerNorm(config.width)
        self.query_key_value = Linear(config.width, 3 * config.width, bias=False)
        self.attention_output = Linear(config.width, config.width)
        self.feedforward_norm = nn.LayerNorm(config.width)
        self.feedforward_input = Linear(config.width, hidden)
        self.feedforward_output = Linear(hidden, config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, hidden: Tensor, layout: BucketLayout) -> Tensor:
        """Shapes: hidden [T, D] -> [T, D]."""
        attended = self._attend(self.attention_norm(hidden), layout)
        return self.feed_forward(hidden + self.dropout(attended))

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """Shapes: [T, D] -> [T, D]."""
        expanded = F.relu(self.feedforward_input(self.feedforward_norm(hidden)))
        return hidden + self.dropout(self.feedforward_output(expanded))

    def _attend(self, normalised: Tensor, layout: BucketLayout) -> Tensor:
        projected = self.query_key_value(normalised).unflatten(-1, (3, self.num_heads, -1))
        attended = jagged_attention(*projected.unbind(1), layout)
        return self.attention_output(attended.flatten(1))
