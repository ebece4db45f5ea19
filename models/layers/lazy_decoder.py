"""A decoder of a few codes over a context that is not encoded: blocks share its keys and values as they are.

Source: OneRec-V2 Technical Report (arXiv 2508.20900), lazy decoder-only architecture. RECONSTRUCTED: positions,
which the report does not describe: keys and queries are rotated by them (models/layers/rotary.py), so a block knows
how long ago an event was.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.kernels.context_attention import ContextLayout, context_attention
from models.layers.dropout import Dropout
from models.layers.linear import Linear
from models.layers.rotary import rotate
from models.layers.shared_prompt_attention import (
    PromptKeyValues,
    PromptLayout,
    SuffixKeyValues,
    shared_prompt_attention,
)


@dataclass(frozen=True, kw_only=True)
class LazyShape:
    width: int
    num_blocks: int
    num_heads: int
    kv_layers: int
    """Keys and values that are made of the context (L_kv); neighbouring blocks share them."""
    kv_split: int
    """2 lets values be vectors of their own, with 1 they are the keys (S_kv)."""
    kv_groups: int
    """Heads of keys and values, each shared by as many heads of queries (G_kv)."""
    dropout: float

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def context_dim(self) -> int:
        return self.kv_split * self.kv_layers * self.kv_groups * self.head_dim


@dataclass(frozen=True, kw_only=True)
class KeyValues:
    """Shapes: C tokens of the context."""

    keys: Tensor
    """[C, groups, head dim]."""
    values: Tensor
    """[C, groups, head dim]."""


class ContextKeyValues(nn.Module):
    """Cuts context vectors into chunks: with a norm, and keys with a rotation, they are keys and values."""

    def __init__(self, shape: LazyShape):
        super().__init__()
        self.shape = shape
        chunk = shape.kv_groups * shape.head_dim
        self.norms = nn.ModuleList(nn.RMSNorm(chunk) for _ in range(shape.kv_layers * shape.kv_split))

    def forward(self, vectors: Tensor, places: Tensor) -> tuple[KeyValues, ...]:
        """Shapes: vectors [C, context dim], places [C] -> L_kv of them."""
        groups, split = self.shape.kv_groups, self.shape.kv_split
        chunks = [
            norm(chunk.float()).unflatten(-1, (groups, -1))
            for norm, chunk in zip(self.norms, vectors.chunk(len(self.norms), dim=-1), strict=True)
        ]
        return tuple(
            KeyValues(keys=rotate(keys, places), values=values)
            for keys, values in zip(chunks[::split], chunks[split - 1 :: split], strict=True)
        )


class LazyBlock(nn.Module):
    """Attention to the context without projections of it, causal attention to earlier codes, feed-forward."""

    def __init__(self, shape: LazyShape, feedforward: nn.Module):
        super().__init__()
        width = shape.width
        self.num_heads, self.kv_groups = shape.num_heads, shape.kv_groups
        self.context_norm, self.code_norm, self.feedforward_norm = (nn.RMSNorm(width) for _ in range(3))
        self.context_query = Linear(width, width, bias=False)
        self.context_output = Linear(width, width, bias=False)
        self.query_key_value = Linear(width, 3 * width, bias=False)
        self.code_output = Linear(width, width, bias=False)
        self.feedforward = feedforward
        self.dropout = Dropout(shape.dropout)

    def forward(self, hidden: Tensor, positions: Tensor, context: KeyValues, layout: ContextLayout) -> Tensor:
        """Whole paths. Shapes: hidden [N, L, D], positions [N] -> [N, L, D]."""
        size, flat = hidden.shape[:2], hidden.flatten(0, 1)
        queries = rotate(self._context_queries(flat).unflatten(0, size), positions[:, None])
        attended = context_attention(queries, context.keys, context.values, layout)
        flat = flat + self.dropout(self.context_output(attended.flatten(2).flatten(0, 1)))
        queries, keys, values = (part.unflatten(0, size) for part in self._project_codes(flat))
        attended = causal_attention(queries, keys, values)
        return self._finish(flat, attended.flatten(2).flatten(0, 1)).unflatten(0, size)

    def extend(
        self, hidden: Tensor, positions: Tensor, context: PromptKeyValues, before: SuffixKeyValues | None
    ) -> tuple[Tensor, SuffixKeyValues]:
        """One more code for each of W prefixes per user. Shapes: hidden [B, W, D], positions [B] -> [B, W, D]."""
        size, flat = hidden.shape[:2], hidden.flatten(0, 1)
        queries = rotate(self._context_queries(flat).unflatten(0, size), positions[:, None])
        # Heads that share keys ask as if they were further prefixes.
        shared = queries.unflatten(2, (self.kv_groups, -1)).transpose(2, 3)
        attended = shared_prompt_attention(shared.flatten(1, 2), context).unflatten(1, shared.shape[1:3])
        flat = flat + self.dropout(self.context_output(attended.transpose(2, 3).flatten(2).flatten(0, 1)))
        queries, keys, values = (part.unflatten(0, size) for part in self._project_codes(flat))
        suffix = SuffixKeyValues.append(before, keys, values)
        return self._finish(flat, _attend_suffix(queries, suffix).flatten(2).flatten(0, 1)).unflatten(
            0, size
        ), suffix

    def _context_queries(self, flat: Tensor) -> Tensor:
        return self.context_query(self.context_norm(flat)).unflatten(-1, (self.num_heads, -1))

    def _project_codes(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Shapes: [n, D] -> 3 x [n, heads, D / heads]."""
        projected = self.query_key_value(self.code_norm(flat))
        return projected.unflatten(-1, (3, self.num_heads, -1)).unbind(1)

    def _finish(self, flat: Tensor, attended: Tensor) -> Tensor:
        flat = flat + self.dropout(self.code_output(attended))
        return flat + self.dropout(self.feedforward(self.feedforward_norm(flat)))


class LazyDecoder(nn.Module):
    """Blocks over the codes of a target; block i reads the keys and values number floor(i * L_kv / blocks)."""

    def __init__(self, shape: LazyShape, feedforwards: Sequence[nn.Module]):
        super().__init__()
        self.shape = shape
        self.context = ContextKeyValues(shape)
        self.blocks = nn.ModuleList(LazyBlock(shape, feedforward) for feedforward in feedforwards)

    def forward(
        self, hidden: Tensor, positions: Tensor, context: Sequence[KeyValues], layout: ContextLayout
    ) -> Tensor:
        """Shapes: hidden [N, L, D], positions [N] -> [N, L, D]."""
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, positions, context[self._source(number)], layout)
        return hidden

    def remember(self, context: Sequence[KeyValues], layout: PromptLayout) -> tuple[PromptKeyValues, ...]:
        """The context as `extend` reads it."""
        return tuple(PromptKeyValues.build(one.keys, one.values, layout) for one in context)

    def extend(
        self,
        hidden: Tensor,
        positions: Tensor,
        context: Sequence[PromptKeyValues],
        before: Sequence[SuffixKeyValues | None],
    ) -> tuple[Tensor, list[SuffixKeyValues]]:
        """Shapes: hidden [B, W, D], positions [B] -> [B, W, D]."""
        suffixes = []
        for number, block in enumerate(self.blocks):
            hidden, suffix = block.extend(hidden, positions, context[self._source(number)], before[number])
            suffixes.append(suffix)
        return hidden, suffixes

    def _source(self, number: int) -> int:
        return number * self.shape.kv_layers // len(self.blocks)


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Each code of a path attends to itself and to earlier ones; paths are short and all alike in length.

    Shapes: [N, L, heads, D] each -> [N, L, heads, D].
    """
    scores = torch.einsum("nqhd,nkhd->nhqk", queries, keys).float() * queries.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1).to(values.dtype)
    return torch.einsum("nhqk,nkhd->nqhd", weights, values)


def _attend_suffix(queries: Tensor, suffix: SuffixKeyValues) -> Tensor:
    """Shapes: queries [B, W, heads, D] -> [B, W, heads, D]."""
    scores = (queries[:, :, None] * suffix.keys).sum(-1).float() * queries.shape[-1] ** -0.5
    weights = scores.softmax(2).to(suffix.values.dtype)
    return (weights[..., None] * suffix.values).sum(2)
