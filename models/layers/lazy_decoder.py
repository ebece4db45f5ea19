"""A decoder of a few codes over a context that is not encoded: blocks share its keys and values as they are.

Source: OneRec-V2 Technical Report (arXiv 2508.20900), lazy decoder-only architecture. RECONSTRUCTED: positions,
which the report does not describe: keys and queries are rotated by them (models/layers/rotary.py), so a block knows
how long ago an event was.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from models.kernels.context_attention import ContextLayout
from models.layers.code_decoder import CodeBlock, KeyValues
from models.layers.rotary import rotate
from models.layers.shared_prompt_attention import PromptKeyValues, PromptLayout, SuffixKeyValues


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


class LazyBlock(CodeBlock):
    """Attends to the context without any projection of it."""

    def __init__(self, shape: LazyShape, feedforward: nn.Module):
        super().__init__(
            width=shape.width,
            num_heads=shape.num_heads,
            kv_groups=shape.kv_groups,
            feedforward=feedforward,
            dropout=shape.dropout,
        )

    def place(self, queries: Tensor, positions: Tensor) -> Tensor:
        return rotate(queries, positions[:, None])


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
