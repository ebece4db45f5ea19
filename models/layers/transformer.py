"""The transformer blocks of models that generate: trained over whole sequences, continued prefix by prefix."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels.jagged_attention import jagged_attention
from models.kernels.length_buckets import BucketLayout
from models.kernels.masked_attention import masked_attention
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


@dataclass(frozen=True, kw_only=True)
class Memory(ABC):
    """Encoded tokens that others attend to, each to those it may see."""

    states: Tensor
    """[E, D] of all tokens of the encoder."""

    @abstractmethod
    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Shapes: queries [N, heads, D], keys and values [E, heads, D] -> [N, heads, D]."""


class FeedForward(nn.Module):
    """Two linear maps with a GELU in between."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.input, self.output = Linear(width, hidden), Linear(hidden, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Shapes: [T, D] -> [T, D]."""
        return self.output(F.gelu(self.input(hidden), approximate="tanh"))


class TransformerBlock(nn.Module):
    """Pre-norm causal attention and feed-forward, each added to the residual stream.

    `forward` computes whole sequences. `remember` does the same and keeps the keys and values of a prompt, which
    `extend` then continues for many prefixes of a user at once; the two together equal `forward`.
    """

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        feedforward: nn.Module,
        dropout: float,
        head_width: int | None = None,
    ):
        """Without a head width, the heads share the width of the block."""
        super().__init__()
        inner = num_heads * head_width if head_width else width
        self.num_heads = checked_heads(num_heads, inner)
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = Linear(width, 3 * inner, bias=False)
        self.attention_output = Linear(inner, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = feedforward
        self.dropout = Dropout(dropout)

    def forward(self, hidden: Tensor, layout: BucketLayout, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Causal, or with what the masks of the buckets let each token see. Shapes: hidden [T, D] -> [T, D]."""
        if masks is None:
            return self._finish(hidden, jagged_attention(*self._project(hidden), layout))
        return self._finish(hidden, masked_attention(*self._project(hidden), masks, layout))

    def remember(self, hidden: Tensor, layout: PromptLayout) -> tuple[Tensor, PromptKeyValues]:
        """`forward` over prompts, and their keys and values. Shapes: hidden [T, D] -> [T, D]."""
        queries, keys, values = self._project(hidden)
        attended = jagged_attention(queries, keys, values, layout.cells)
        return self._finish(hidden, attended), PromptKeyValues.build(keys, values, layout)

    def extend(
        self, hidden: Tensor, prompt: PromptKeyValues, before: SuffixKeyValues | None
    ) -> tuple[Tensor, SuffixKeyValues]:
        """One more token for each of W prefixes per user. Shapes: hidden [B, W, D] -> [B, W, D]."""
        flat = hidden.flatten(0, 1)
        queries, keys, values = (part.unflatten(0, hidden.shape[:2]) for part in self._project(flat))
        suffix = SuffixKeyValues.append(before, keys, values)
        attended = shared_prompt_attention(queries, prompt, suffix)
        return self._finish(flat, attended.flatten(0, 1)).unflatten(0, hidden.shape[:2]), suffix

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shapes: [T, D] -> 3 x [T, heads, D / heads]."""
        projected = self.query_key_value(self.attention_norm(hidden))
        return projected.unflatten(-1, (3, self.num_heads, -1)).unbind(1)

    def _finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Shapes: hidden [T, D], attended [T, heads, D / heads] -> [T, D]."""
        return self._feed_forward(self._add(hidden, attended))

    def _add(self, hidden: Tensor, attended: Tensor) -> Tensor:
        return hidden + self.dropout(self.attention_output(attended.flatten(1)))

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.dropout(self.feedforward(self.feedforward_norm(hidden)))


class DecoderBlock(TransformerBlock):
    """A block with cross-attention to encoded tokens between its own attention and feed-forward.

    `forward` computes whole sequences. `extend_decoded` computes one more token of many prefixes of a user; the keys
    and values of what a user's prefixes attend to are kept once per user.
    """

    def __init__(
        self, *, width: int, num_heads: int, head_width: int, feedforward: nn.Module, dropout: float
    ):
        super().__init__(
            width=width,
            num_heads=num_heads,
            head_width=head_width,
            feedforward=feedforward,
            dropout=dropout,
        )
        inner = num_heads * head_width
        self.cross_norm = nn.LayerNorm(width)
        self.cross_query = Linear(width, inner, bias=False)
        self.cross_key_value = Linear(width, 2 * inner, bias=False)
        self.cross_output = Linear(inner, width)

    def forward(self, hidden: Tensor, layout: BucketLayout, memory: Memory) -> Tensor:
        """Shapes: hidden [N, D] -> [N, D]."""
        hidden = self._add(hidden, jagged_attention(*self._project(hidden), layout))
        attended = memory.attend(self._cross_queries(hidden), *self._memory_key_values(memory.states))
        return self._feed_forward(self._add_cross(hidden, attended))

    def remember_memory(self, states: Tensor, layout: PromptLayout) -> PromptKeyValues:
        """Shapes: states [E, D]."""
        return PromptKeyValues.build(*self._memory_key_values(states), layout)

    def extend_decoded(
        self, hidden: Tensor, memory: PromptKeyValues, before: SuffixKeyValues | None
    ) -> tuple[Tensor, SuffixKeyValues]:
        """One more token for each of W prefixes per user. Shapes: hidden [B, W, D] -> [B, W, D]."""
        users_and_width, hidden = hidden.shape[:2], hidden.flatten(0, 1)
        queries, keys, values = (part.unflatten(0, users_and_width) for part in self._project(hidden))
        suffix = SuffixKeyValues.append(before, keys, values)
        hidden = self._add(hidden, suffix_attention(queries, suffix).flatten(0, 1))
        queries = self._cross_queries(hidden).unflatten(0, users_and_width)
        attended = shared_prompt_attention(queries, memory).flatten(0, 1)
        return self._feed_forward(self._add_cross(hidden, attended)).unflatten(0, users_and_width), suffix

    def _cross_queries(self, hidden: Tensor) -> Tensor:
        return self.cross_query(self.cross_norm(hidden)).unflatten(-1, (self.num_heads, -1))

    def _memory_key_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.cross_key_value(states).unflatten(-1, (2, self.num_heads, -1)).unbind(1)

    def _add_cross(self, hidden: Tensor, attended: Tensor) -> Tensor:
        return hidden + self.dropout(self.cross_output(attended.flatten(1)))
