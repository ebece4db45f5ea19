"""Attention of queries to an encoded history: of the decoder's tokens, and of candidates that are scored."""

import torch
from torch import Tensor, nn

from models.kernels.jagged_attention import jagged_attention
from models.kernels.length_buckets import BucketLayout
from models.layers.dropout import Dropout
from models.layers.heads import checked_heads
from models.layers.linear import Linear
from models.layers.shared_prompt_attention import (
    PromptKeyValues,
    PromptLayout,
    SuffixKeyValues,
    shared_prompt_attention,
    suffix_attention,
)


class CrossAttention(nn.Module):
    """Queries over keys and values of a history, which are computed once per event."""

    def __init__(self, width: int, num_heads: int, memory_width: int | None = None):
        """Without a width of its own, the history is as wide as the queries."""
        super().__init__()
        self.num_heads = checked_heads(num_heads, width)
        self.query = Linear(width, width, bias=False)
        self.key_value = Linear(memory_width or width, 2 * width, bias=False)
        self.output = Linear(width, width)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes: [T, D] -> 2 x [T, heads, D / heads]."""
        return self.key_value(states).unflatten(-1, (2, self.num_heads, -1)).unbind(1)

    def remember(self, states: Tensor, layout: PromptLayout, events: Tensor | None = None) -> PromptKeyValues:
        """Keys and values of histories, made of all states or of some of them in another order.

        The weights of a query sum to one, so that a single head's output layer can be applied to the events instead of
        to the queries, of which there are many more.

        Shapes: states [T, D], events [E] indices into them.
        """
        keys, values = self.keys_values(states)
        if self.num_heads == 1:
            values = self.output(values.flatten(1))[:, None]
        if events is not None:
            keys, values = keys[events], values[events]
        return PromptKeyValues.build(keys, values, layout)

    def queries(self, hidden: Tensor) -> Tensor:
        """Shapes: [..., D] -> [..., heads, D / heads]."""
        flat = self.query(hidden.flatten(0, -2)).view(hidden.shape)
        return flat.unflatten(-1, (self.num_heads, -1))

    def forward(self, queries: Tensor, memory: PromptKeyValues) -> Tensor:
        """W queries per history. Shapes: [B, W, heads, D / heads] -> [B, W, D]."""
        attended = shared_prompt_attention(queries, memory).flatten(2)
        if self.num_heads == 1:
            return attended
        return self.output(attended.flatten(0, 1)).view(attended.shape)

    def up_to_each(self, hidden: Tensor, states: Tensor, layout: BucketLayout) -> Tensor:
        """W queries per event, over the history up to it. Shapes: hidden [T, W, D], states [T, D] -> [T, W, D]."""
        keys, values = self.keys_values(states)
        attended = [jagged_attention(own, keys, values, layout) for own in self.queries(hidden).unbind(1)]
        return self.output(torch.stack(attended, dim=1).flatten(0, 1).flatten(1)).view(hidden.shape)


class CrossDecoderBlock(nn.Module):
    """Pre-norm attention to the codes so far, attention to the history, and feed-forward.

    `forward` computes the tokens of every event's next item at once; `extend` goes on with one more token for many
    prefixes of a user. The two agree.
    """

    def __init__(self, *, width: int, num_heads: int, feedforward: nn.Module, dropout: float):
        super().__init__()
        self.num_heads = checked_heads(num_heads, width)
        self.self_norm, self.cross_norm, self.feedforward_norm = (nn.LayerNorm(width) for _ in range(3))
        self.query_key_value = Linear(width, 3 * width, bias=False)
        self.self_output = Linear(width, width)
        self.cross_attention = CrossAttention(width, num_heads)
        self.feedforward = feedforward
        self.dropout = Dropout(dropout)

    def forward(self, hidden: Tensor, own: BucketLayout, states: Tensor, layout: BucketLayout) -> Tensor:
        """L tokens for each event; `own` groups them, `layout` the events. Shapes: [T, L, D], states [T, D]."""
        attended = jagged_attention(*self._project(hidden.flatten(0, 1)), own)
        hidden = hidden + self.dropout(self.self_output(attended.flatten(1))).view_as(hidden)
        crossed = self.cross_attention.up_to_each(self.cross_norm(hidden), states, layout)
        return self._feed(hidden + self.dropout(crossed))

    def extend(
        self, hidden: Tensor, memory: PromptKeyValues, before: SuffixKeyValues | None
    ) -> tuple[Tensor, SuffixKeyValues]:
        """One more token for each of W prefixes per user. Shapes: hidden [B, W, D] -> [B, W, D]."""
        projected = self._project(hidden.flatten(0, 1))
        queries, keys, values = (part.unflatten(0, hidden.shape[:2]) for part in projected)
        suffix = SuffixKeyValues.append(before, keys, values)
        attended = suffix_attention(queries, suffix).flatten(0, 1).flatten(1)
        hidden = hidden + self.dropout(self.self_output(attended)).view_as(hidden)
        hidden = hidden + self.dropout(self._cross(hidden, memory))
        return self._feed(hidden), suffix

    def _cross(self, hidden: Tensor, memory: PromptKeyValues) -> Tensor:
        return self.cross_attention(self.cross_attention.queries(self.cross_norm(hidden)), memory)

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shapes: [n, D] -> 3 x [n, heads, D / heads]."""
        projected = self.query_key_value(self.self_norm(hidden))
        return projected.unflatten(-1, (3, self.num_heads, -1)).unbind(1)

    def _feed(self, hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        return (flat + self.dropout(self.feedforward(self.feedforward_norm(flat)))).view_as(hidden)
