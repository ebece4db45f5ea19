"""The transformer block of models that generate: trained over whole sequences, continued prefix by prefix."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels.jagged_attention import jagged_attention
from models.kernels.length_buckets import BucketLayout
from models.layers.dropout import Dropout
from models.layers.linear import Linear
from models.layers.shared_prompt_attention import (
    PromptKeyValues,
    PromptLayout,
    SuffixKeyValues,
    shared_prompt_attention,
)


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

    def __init__(self, *, width: int, num_heads: int, feedforward: nn.Module, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = Linear(width, 3 * width, bias=False)
        self.attention_output = Linear(width, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = feedforward
        self.dropout = Dropout(dropout)

    def forward(self, hidden: Tensor, layout: BucketLayout) -> Tensor:
        """Shapes: hidden [T, D] -> [T, D]."""
        return self._finish(hidden, jagged_attention(*self._project(hidden), layout))

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
        hidden = hidden + self.dropout(self.attention_output(attended.flatten(1)))
        return hidden + self.dropout(self.feedforward(self.feedforward_norm(hidden)))
