"""A block over the codes of a target that also attends to its user: what the two decoders of OneRec share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.kernels.context_attention import ContextCells, ContextLayout, context_attention
from models.layers.dropout import Dropout
from models.layers.linear import Linear
from models.layers.norm import RMSNorm
from models.layers.shared_prompt_attention import (
    PromptKeyValues,
    SuffixKeyValues,
    shared_prompt_attention,
    suffix_attention,
)


@dataclass(frozen=True, kw_only=True)
class KeyValues:
    """What is known of users, as one layer attends to it. Shapes: C tokens."""

    keys: Tensor
    """[C, groups, head dim]."""
    values: Tensor
    """[C, groups, head dim]."""


class CodeBlock(nn.Module):
    """Attention to what is known of the user, causal attention to earlier codes, and feed-forward, each pre-norm.

    `forward` computes whole paths, `extend` one more code for many prefixes of a user; the two agree.
    """

    context_first = True
    """Whether the user is attended to before the earlier codes are."""

    def __init__(self, *, width: int, num_heads: int, kv_groups: int, feedforward: nn.Module, dropout: float):
        super().__init__()
        self.num_heads, self.kv_groups = num_heads, kv_groups
        self.context_norm, self.code_norm, self.feedforward_norm = (RMSNorm(width) for _ in range(3))
        self.context_query = Linear(width, width, bias=False)
        self.context_output = Linear(width, width, bias=False)
        self.query_key_value = Linear(width, 3 * width, bias=False)
        self.code_output = Linear(width, width, bias=False)
        self.feedforward = feedforward
        self.dropout = Dropout(dropout)

    def place(self, queries: Tensor, positions: Tensor) -> Tensor:
        """Queries to the user's context that know where the target stands.

        Shapes: queries [n, L, heads, D], positions [n] -> [n, L, heads, D].
        """
        return queries

    def forward(
        self, hidden: Tensor, positions: Tensor, context: ContextCells, layout: ContextLayout
    ) -> Tensor:
        """Shapes: hidden [N, L, D], positions [N] -> [N, L, D]."""

        def read_context(queries: Tensor) -> Tensor:
            return context_attention(self.place(queries, positions), context, layout)

        return self._compute(hidden, read_context, causal_attention)

    def extend(
        self, hidden: Tensor, positions: Tensor, context: PromptKeyValues, before: SuffixKeyValues | None
    ) -> tuple[Tensor, SuffixKeyValues]:
        """Shapes: hidden [B, W, D], positions [B] -> [B, W, D]."""
        longer: list[SuffixKeyValues] = []

        def read_context(queries: Tensor) -> Tensor:
            # Heads that share keys ask as if they were further prefixes.
            shared = self.place(queries, positions).unflatten(2, (self.kv_groups, -1)).transpose(2, 3)
            attended = shared_prompt_attention(shared.flatten(1, 2), context)
            return attended.unflatten(1, shared.shape[1:3]).transpose(2, 3).flatten(2, 3)

        def read_codes(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            longer.append(SuffixKeyValues.append(before, keys, values))
            return suffix_attention(queries, longer[0])

        return self._compute(hidden, read_context, read_codes), longer[0]

    def _compute(
        self,
        hidden: Tensor,
        read_context: Callable[[Tensor], Tensor],
        read_codes: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        size, flat = hidden.shape[:2], hidden.flatten(0, 1)
        for is_context in (self.context_first, not self.context_first):
            if is_context:
                queries = self.context_query(self.context_norm(flat)).unflatten(-1, (self.num_heads, -1))
                attended, output = read_context(queries.unflatten(0, size)), self.context_output
            else:
                projected = self.query_key_value(self.code_norm(flat))
                parts = projected.unflatten(-1, (3, self.num_heads, -1)).unflatten(0, size).unbind(2)
                attended, output = read_codes(*parts), self.code_output
            flat = flat + self.dropout(output(attended.flatten(2).flatten(0, 1)))
        flat = flat + self.dropout(self.feedforward(self.feedforward_norm(flat)))
        return flat.unflatten(0, size)


class CodeDecoder(nn.Module):
    """Blocks over the codes of a target, each with one of the given keys and values of the user."""

    def __init__(self, blocks: Sequence[CodeBlock], sources: Sequence[int]):
        """`sources`: which keys and values each block reads."""
        super().__init__()
        self.blocks, self.sources = nn.ModuleList(blocks), tuple(sources)

    def forward(
        self, hidden: Tensor, positions: Tensor, context: Sequence[KeyValues], layout: ContextLayout
    ) -> Tensor:
        """Shapes: hidden [N, L, D], positions [N] -> [N, L, D]."""
        cells = [ContextCells.build(own.keys, own.values, layout) for own in context]
        for block, source in zip(self.blocks, self.sources, strict=True):
            hidden = block(hidden, positions, cells[source], layout)
        return hidden

    def extend(
        self,
        hidden: Tensor,
        positions: Tensor,
        context: Sequence[PromptKeyValues],
        before: Sequence[SuffixKeyValues | None],
    ) -> tuple[Tensor, tuple[SuffixKeyValues, ...]]:
        """Shapes: hidden [B, W, D], positions [B] -> [B, W, D]."""
        longer = []
        for block, source, own in zip(self.blocks, self.sources, before, strict=True):
            hidden, suffix = block.extend(hidden, positions, context[source], own)
            longer.append(suffix)
        return hidden, tuple(longer)


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Each code of a path attends to itself and to earlier ones; paths are short and all alike in length.

    Shapes: [N, L, heads, D] each -> [N, L, heads, D].
    """
    scores = torch.einsum("nqhd,nkhd->nhqk", queries, keys).float() * queries.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1).to(values.dtype)
    return torch.einsum("nhqk,nkhd->nqhd", weights, values)
