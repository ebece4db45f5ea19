"""Attention without softmax of any tokens to the first so many context tokens of their user.

Each cell of a query and a visible key weighs SiLU(q . k + bias by age), and nothing else: what is hidden has a weight
of exactly zero, so that no bit of the result depends on it. Keys are the user's context alone; queries may be other
tokens than these (`own_attention` adds what such a query sees of itself). So K queries and N keys of a user cost K N
cells, where a mask over all of a user's tokens would cost (N + K)^2. `reference_prefix_attention` computes query by
query and is what it is tested against.

Source of the weights: Zhai et al., Actions Speak Louder than Words (2024).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data_streams.jagged import Jagged
from models.kernels.length_buckets import (
    BucketLayout,
    bucket_layout,
    following_layout,
    to_cells,
    to_tokens,
)
from models.kernels.pointwise_attention import LATER, TakeWeights
from models.layers.linear import matmul_dtype, without_autocast

NUM_AGE_BUCKETS = 32
"""Ages are counted in half powers of two: enough for 2^16 tokens."""


@dataclass(frozen=True, kw_only=True)
class PrefixLayout:
    """Queries and keys of the same users in buckets; made once per batch for all layers."""

    queries: BucketLayout
    keys: BucketLayout
    visible: tuple[Tensor, ...]
    """By bucket: [users, queries] int64, how many keys each query sees."""
    ages: tuple[Tensor, ...]
    """By bucket: [users, queries, keys] int64, bucket of how many tokens there are from each key to the end of what the
    query sees; 0 for the last of them."""

    @staticmethod
    def build(visible: Jagged, keys: Jagged) -> "PrefixLayout":
        """Every user with keys must have a query. Shapes: visible [Q] and keys [N] in B rows."""
        queries = bucket_layout(visible)
        offered = following_layout(visible, queries, keys)
        seen = tuple(cells[..., 0] for cells in to_cells(visible.values[:, None], queries))
        ages = tuple(
            age_buckets(own[..., None] - torch.arange(length, device=own.device))
            for own, (_, length) in zip(seen, offered.buckets, strict=True)
        )
        return PrefixLayout(queries=queries, keys=offered, visible=seen, ages=ages)


def age_buckets(ages: Tensor) -> Tensor:
    """floor(2 log2(age)). Example: 1 -> 0, 2 -> 2, 3 -> 3, 8 -> 6."""
    return (2 * ages.clamp(min=1).float().log2()).long().clamp(max=NUM_AGE_BUCKETS - 1)


def prefix_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: PrefixLayout,
    by_age: Tensor | None,
) -> Tensor:
    """The sum of the visible values, weighted; not divided by anything.

    Shapes: queries [Q, heads, A], keys [N, heads, A], values [N, heads, V], by_age [heads,
    NUM_AGE_BUCKETS] -> [Q, heads, V].
    """
    if queries.shape[0] == 0:
        # All must have a gradient, or ranks would exchange gradients of unequal size.
        parts = (queries, keys, values) if by_age is None else (queries, keys, values, by_age)
        return values.new_zeros(0, *values.shape[1:]) + sum(part.sum() * 0 for part in parts)
    first = NUM_AGE_BUCKETS * torch.arange(queries.shape[1], device=queries.device)[:, None, None]
    key_cells = to_cells(torch.cat((keys, values), dim=-1), layout.keys)
    blocks = []
    for number, (asking, offered) in enumerate(
        zip(to_cells(queries, layout.queries), key_cells, strict=True)
    ):
        bias = (
            None
            if by_age is None
            else TakeWeights.apply(by_age.flatten(), layout.ages[number][:, None] + first)
        )
        blocks.append(_attend(asking, offered, layout.visible[number], bias))
    return to_tokens(blocks, layout.queries)


def _attend(queries: Tensor, offered: Tensor, visible: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes: queries [u, Q, heads, A], offered [u, K, heads, A + V], visible [u, Q], bias [u, heads, Q, K]
    -> [u, Q, heads, V]."""
    # On a processor the library would compile bf16 products for each of the many lengths of keys.
    dtype = torch.float32 if queries.device.type == "cpu" else matmul_dtype(queries)
    length = offered.shape[1]
    hidden = torch.arange(length, device=visible.device) >= visible[..., None]
    with without_autocast(queries):
        asking = queries.transpose(1, 2).to(dtype)
        keys, values = (
            offered.transpose(1, 2)
            .to(dtype)
            .split((queries.shape[-1], offered.shape[-1] - queries.shape[-1]), -1)
        )
        scores = asking @ keys.transpose(2, 3) + LATER * hidden[:, None].to(dtype)
        if bias is not None:
            scores = scores + bias.to(dtype)
        weights = F.silu(scores)
        return (weights @ values).transpose(1, 2).to(queries.dtype)


def own_attention(queries: Tensor, keys: Tensor, values: Tensor, by_age: Tensor | None) -> Tensor:
    """What each token adds of itself, of age 1. Shapes: [Q, heads, A], the same, [Q, heads, V] -> [Q, heads, V]."""
    scores = (queries * keys).sum(-1, keepdim=True)
    return F.silu(scores if by_age is None else scores + by_age[:, :1]) * values


def count_alike(queries: Tensor, keys: Tensor, layout: PrefixLayout) -> Tensor:
    """How many of the keys that a query sees have its id. Shapes: ids [Q] and [N] int64 -> [Q] int64."""
    if queries.shape[0] == 0:
        return queries
    counts = []
    for asking, offered, visible in zip(
        to_cells(queries[:, None], layout.queries),
        to_cells(keys[:, None], layout.keys),
        layout.visible,
        strict=True,
    ):
        seen = torch.arange(offered.shape[1], device=visible.device) < visible[..., None]
        counts.append(((asking == offered.transpose(1, 2)) & seen).sum(-1, keepdim=True))
    return to_tokens(counts, layout.queries)[:, 0]


def reference_prefix_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Jagged,
    context: Jagged,
    by_age: Tensor | None,
) -> Tensor:
    """The same, query by query and written out."""
    outputs, first = [], context.offsets.tolist()
    for number, user in enumerate(visible.row_index().tolist()):
        seen = slice(first[user], first[user] + int(visible.values[number]))
        scores = torch.einsum("hd,khd->kh", queries[number], keys[seen])
        if by_age is not None:
            scores = scores + by_age.T[age_buckets(torch.arange(len(scores), 0, -1))]
        outputs.append(torch.einsum("kh,khd->hd", F.silu(scores), values[seen]))
    return torch.stack(outputs)
