"""An encoder in which every token sees all of its sequence."""

from collections.abc import Sequence

from torch import Tensor, nn

from data_streams.jagged import Jagged
from models.kernels.length_buckets import BucketLayout, bucket_layout
from models.kernels.masked_attention import masked_attention, prefix_masks
from models.layers.dropout import Dropout
from models.layers.heads import checked_heads
from models.layers.linear import Linear
from models.layers.norm import RMSNorm


class FullBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, *, width: int, num_heads: int, feedforward: nn.Module, dropout: float):
        super().__init__()
        self.num_heads = checked_heads(num_heads, width)
        self.attention_norm, self.feedforward_norm = RMSNorm(width), RMSNorm(width)
        self.query_key_value = Linear(width, 3 * width, bias=False)
        self.output = Linear(width, width, bias=False)
        self.feedforward = feedforward
        self.dropout = Dropout(dropout)

    def forward(self, hidden: Tensor, layout: BucketLayout, masks: Sequence[Tensor]) -> Tensor:
        """Shapes: hidden [S, D] -> [S, D]."""
        projected = self.query_key_value(self.attention_norm(hidden))
        queries, keys, values = projected.unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        attended = masked_attention(queries, keys, values, masks, layout)
        hidden = hidden + self.dropout(self.output(attended.flatten(1)))
        return hidden + self.dropout(self.feedforward(self.feedforward_norm(hidden)))


class FullEncoder(nn.Module):
    """A block per given feed-forward part, and a last norm."""

    def __init__(self, *, width: int, num_heads: int, feedforwards: Sequence[nn.Module], dropout: float):
        super().__init__()
        self.blocks = nn.ModuleList(
            FullBlock(width=width, num_heads=num_heads, feedforward=part, dropout=dropout)
            for part in feedforwards
        )
        self.final_norm = RMSNorm(width)

    def forward(self, hidden: Tensor, sequences: Jagged) -> Tensor:
        """Shapes: hidden [S, D] -> [S, D]."""
        layout = bucket_layout(sequences)
        masks = prefix_masks(sequences.lengths[sequences.row_index()], layout)
        for block in self.blocks:
            hidden = block(hidden, layout, masks)
        return self.final_norm(hidden)
