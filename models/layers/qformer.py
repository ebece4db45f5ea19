"""A few learned queries that stand for a long history: attention to its events, and feed-forward.

Source: OneRec Technical Report (arXiv 2506.13695), lifelong pathway. RECONSTRUCTED: keys are rotated by the places of
events and queries by that of the target, so that one copy of a user's keys serves all of its targets.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.kernels.context_attention import ContextCells, ContextLayout, context_attention
from models.layers.dropout import Dropout
from models.layers.heads import checked_heads
from models.layers.linear import Linear
from models.layers.norm import RMSNorm
from models.layers.rotary import rotate


class QFormerBlock(nn.Module):
    """Pre-norm attention of Q queries per target to the events, and feed-forward; queries do not see each other."""

    def __init__(self, *, width: int, num_heads: int, feedforward: nn.Module, dropout: float):
        super().__init__()
        self.num_heads = checked_heads(num_heads, width)
        self.query_norm, self.feedforward_norm = RMSNorm(width), RMSNorm(width)
        self.query = Linear(width, width, bias=False)
        self.key_value = Linear(width, 2 * width, bias=False)
        self.output = Linear(width, width, bias=False)
        self.feedforward = feedforward
        self.dropout = Dropout(dropout)

    def forward(
        self, hidden: Tensor, positions: Tensor, events: Tensor, places: Tensor, layout: ContextLayout
    ) -> Tensor:
        """Shapes: hidden [N, Q, D], positions [N], events [C, D], places [C] -> [N, Q, D]."""
        size, flat = hidden.shape[:2], hidden.flatten(0, 1)
        queries = self.query(self.query_norm(flat)).unflatten(-1, (self.num_heads, -1)).unflatten(0, size)
        keys, values = self.key_value(events).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        context = ContextCells.build(rotate(keys, places), values, layout)
        attended = context_attention(rotate(queries, positions[:, None]), context, layout)
        flat = flat + self.dropout(self.output(attended.flatten(2).flatten(0, 1)))
        return (flat + self.dropout(self.feedforward(self.feedforward_norm(flat)))).unflatten(0, size)


class QFormer(nn.Module):
    """The learned queries and a block per given feed-forward part."""

    def __init__(
        self,
        *,
        num_queries: int,
        width: int,
        num_heads: int,
        feedforwards: Sequence[nn.Module],
        dropout: float,
    ):
        super().__init__()
        self.queries = nn.Embedding(num_queries, width)
        self.event_norm = RMSNorm(width)
        self.blocks = nn.ModuleList(
            QFormerBlock(width=width, num_heads=num_heads, feedforward=part, dropout=dropout)
            for part in feedforwards
        )

    def forward(self, positions: Tensor, events: Tensor, places: Tensor, layout: ContextLayout) -> Tensor:
        """Each target's queries read the events that it may know.

        Shapes: positions [N], events [C, D], places [C] -> [N, Q, D].
        """
        numbers = torch.arange(self.queries.num_embeddings, device=positions.device)
        hidden = self.queries(numbers).expand(positions.shape[0], -1, -1) * events.shape[1] ** 0.5
        events = self.event_norm(events.float())
        for block in self.blocks:
            hidden = block(hidden, positions, events, places, layout)
        return hidden
