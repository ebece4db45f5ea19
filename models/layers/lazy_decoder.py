"""A decoder of a few codes over a context that is not encoded: blocks share its keys and values as they are.

Source: OneRec-V2 Technical Report (arXiv 2508.20900), lazy decoder-only architecture. RECONSTRUCTED: positions,
which the report does not describe: keys and queries are rotated by them (models/layers/rotary.py), so a block knows
how long ago an event was.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from models.kernels.context_keys import turn_normed
from models.layers.code_decoder import CodeBlock, CodeDecoder, KeyValues
from models.layers.rotary import rotate


@dataclass(frozen=True, kw_only=True)
class LazyShape:
    """Sizes of the decoder, with the report's names for them in brackets."""

    width: int
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


class ContextNorm(nn.RMSNorm):
    """A module of its own, because ZeRO-3 gathers weights for the module that they belong to."""

    def forward(self, vectors: Tensor, places: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Shapes: as of `turn_normed`."""
        return turn_normed(vectors, self.weight, places, groups=groups)


class ContextKeyValues(nn.Module):
    """Cuts context vectors into chunks: with a norm, and keys with a rotation, they are keys and values."""

    def __init__(self, shape: LazyShape):
        super().__init__()
        self.shape = shape
        chunk = shape.kv_groups * shape.head_dim
        self.norms = nn.ModuleList(ContextNorm(chunk) for _ in range(shape.kv_layers * shape.kv_split))

    def forward(self, vectors: Tensor, places: Tensor) -> tuple[KeyValues, ...]:
        """Shapes: vectors [C, context dim], places [C] -> L_kv of them."""
        groups, split = self.shape.kv_groups, self.shape.kv_split
        chunks = vectors.chunk(len(self.norms), dim=-1)
        found = [norm(chunk, places, groups) for norm, chunk in zip(self.norms, chunks, strict=True)]
        return tuple(
            KeyValues(keys=of_keys[0], values=of_values[1])
            for of_keys, of_values in zip(found[::split], found[split - 1 :: split], strict=True)
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


def lazy_decoder(shape: LazyShape, feedforwards: Sequence[nn.Module]) -> CodeDecoder:
    """Block i reads the keys and values number floor(i * L_kv / blocks)."""
    return CodeDecoder(
        [LazyBlock(shape, feedforward) for feedforward in feedforwards],
        [number * shape.kv_layers // len(feedforwards) for number in range(len(feedforwards))],
    )
