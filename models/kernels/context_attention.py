"""Softmax attention of what is to be predicted over what is known of its user, both of unequal length.

Every key says from which position of a target on it is known, and at which one it is forgotten again. So one copy
of a user's keys serves all targets of that user, each with the part of the past it may see. `context_attention`
works on length buckets; `reference_context_attention` computes target by target and is what it is tested against.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_streams.jagged import Jagged
from models.kernels.length_buckets import (
    BucketLayout,
    bucket_layout,
    following_layout,
    padding_cells,
    pair_dtype,
    to_cells,
    to_tokens,
)
from models.kernels.softmax_cells import hidden_bias
from models.layers.linear import without_autocast

NEVER = torch.iinfo(torch.int64).max
"""A position that no target has."""


@dataclass(frozen=True, kw_only=True)
class ContextLayout:
    """Where keys and targets lie, made once per batch for all layers. Shapes: C keys, N targets."""

    keys: BucketLayout
    targets: BucketLayout
    hidden: tuple[Tensor, ...]
    """By bucket: [users, targets, keys], `hidden_bias` of what a target may not see."""

    @staticmethod
    def build(sequences: Jagged, since: Tensor, until: Tensor, positions: Jagged) -> "ContextLayout":
        """A target at position p sees the keys of its user with since <= p < until.

        Shapes: sequences has C keys and positions N targets, a row per user; since and until [C] int64.
        """
        keys = bucket_layout(sequences)
        targets = following_layout(sequences, keys, positions)
        spans = torch.stack((since, until), dim=1)[keys.token_of_cell]
        padding = padding_cells(keys)
        if padding is not None:
            spans = spans.masked_fill(padding, NEVER)
        by_bucket = spans.split([users * length for users, length in keys.buckets])
        hidden = []
        for (users, length), span, at in zip(
            keys.buckets, by_bucket, to_cells(positions.values[:, None], targets), strict=True
        ):
            first, last = span.view(users, 1, length, 2).unbind(-1)
            hidden.append(hidden_bias((at < first) | (at >= last)))
        return ContextLayout(keys=keys, targets=targets, hidden=tuple(hidden))


@dataclass(frozen=True, kw_only=True)
class ContextCells:
    """Keys and values as they lie in the buckets: laid out once, read by many layers."""

    keys: tuple[Tensor, ...]
    """By bucket: [groups * users, length, D]."""
    values: tuple[Tensor, ...]
    left: tuple["Left | None", ...]
    """By bucket: what layers leave to be computed together; None where each computes all by itself."""
    whole: tuple[Tensor, Tensor]
    """What they were made of, [C, groups, D] each."""

    @staticmethod
    def build(keys: Tensor, values: Tensor, layout: ContextLayout) -> "ContextCells":
        """Shapes: keys and values [C, groups, D]."""
        by_group = lambda tokens: [  # noqa: E731
            cells.to(pair_dtype(cells, cells.shape[1])).permute(2, 0, 1, 3).flatten(0, 1)
            for cells in to_cells(tokens, layout.keys)
        ]
        buckets: list[tuple[Tensor, Tensor, Left | None]] = []
        for *own, (_, num_targets) in zip(
            by_group(keys), by_group(values), layout.targets.buckets, strict=True
        ):
            left: Left | None = [] if num_targets == 1 else None
            buckets.append((*(own if left is None else _Shared.apply(*own, left)), left))
        own_keys, own_values, own_left = zip(*buckets, strict=True) if buckets else ((), (), ())
        return ContextCells(keys=own_keys, values=own_values, left=own_left, whole=(keys, values))


def context_attention(queries: Tensor, context: ContextCells, layout: ContextLayout) -> Tensor:
    """Every target must see at least one key. With fewer groups of keys than heads, neighbouring heads share one.

    Shapes: queries [N, L, heads, D] -> [N, L, heads, D].
    """
    if queries.shape[0] == 0:
        return queries + 0 * sum(part.sum() for part in context.whole)
    cells = to_cells(queries, layout.targets)
    blocks = [
        _attend(*parts)
        for parts in zip(cells, context.keys, context.values, layout.hidden, context.left, strict=True)
    ]
    return to_tokens(blocks, layout.targets)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, left: "Left | None") -> Tensor:
    """Shapes: queries [users, N, L, heads, D], keys and values [groups * users, C, D], hidden [users, N, C]."""
    users, _, _, _, dim = queries.shape
    shared = queries.unflatten(3, (len(keys) // users, -1)).permute(3, 0, 1, 4, 2, 5)
    rows = (shared * dim**-0.5).to(keys.dtype).flatten(2, 4).flatten(0, 1)
    of_rows = hidden[:, :, None].expand(-1, -1, shared.shape[3] * shared.shape[4], -1)
    attended = _Attend.apply(rows, keys, values, of_rows, left).view(shared.shape)
    return attended.permute(1, 2, 4, 0, 3, 5).reshape(queries.shape).to(queries.dtype)


Left = list[tuple[Tensor, Tensor, Tensor, Tensor] | None]
"""By layer: the queries, the gradients of their scores, their weights, the gradients of what they attended to."""


class _Attend(torch.autograd.Function):
    """With a list, the gradients of keys and values are left to `_Shared`."""

    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, left: Left | None):
        if left is not None:
            ctx.number = len(left)
            left.append(None)
        with without_autocast(queries):
            scores = (queries @ keys.transpose(1, 2)).float()
            scores.view(len(keys) // len(hidden), *hidden.shape).add_(hidden)
            weights = scores.softmax(-1)
            attended = weights.to(values.dtype) @ values
        ctx.left = left
        ctx.save_for_backward(queries, keys, values, weights)
        return attended

    @staticmethod
    def backward(ctx, gradient: Tensor):
        queries, keys, values, weights = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_weights = (gradient @ values.transpose(1, 2)).float()
        to_scores = torch._softmax_backward_data(to_weights, weights, -1, torch.float32).to(keys.dtype)
        to_queries, parts = to_scores @ keys, (queries, to_scores, weights.to(values.dtype), gradient)
        if ctx.left is None:
            return to_queries, *_to_keys_values(*parts), None, None
        ctx.left[ctx.number] = parts
        return to_queries, None, None, None, None


class _Shared(torch.autograd.Function):
    """Keys and values as they are. Their gradients are computed from all layers at once.

    With few queries they are long and cost little to compute, so to write and add them layer by layer took most of
    the way back.
    """

    @staticmethod
    def forward(ctx, keys: Tensor, values: Tensor, left: Left):
        ctx.left = left
        ctx.set_materialize_grads(False)
        return keys.view_as(keys), values.view_as(values)

    @staticmethod
    def backward(ctx, *nothing: None):
        found = [parts for parts in ctx.left if parts is not None]
        ctx.left[:] = [None] * len(ctx.left)
        return *_to_keys_values(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True))), None


def _to_keys_values(
    queries: Tensor, to_scores: Tensor, weights: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Shapes: queries and gradient [n, Q, D], to_scores and weights [n, Q, C] -> 2 x [n, C, D]."""
    return to_scores.transpose(1, 2) @ queries, weights.transpose(1, 2) @ gradient


def reference_context_attention(
    queries: Tensor, keys: Tensor, values: Tensor, sees: list[list[int]]
) -> Tensor:
    """The same, target by target and written out; `sees` are the keys each target sees.

    Shapes: queries [N, L, heads, D], keys and values [C, groups, D] -> [N, L, heads, D].
    """
    shared = queries.shape[2] // keys.shape[1]
    outputs = torch.zeros_like(queries)
    for number, seen in enumerate(sees):
        k, v = (part[seen].repeat_interleave(shared, dim=1) for part in (keys, values))
        scores_LHC = torch.einsum("lhd,chd->lhc", queries[number], k) / queries.shape[-1] ** 0.5
        outputs[number] = torch.einsum("lhc,chd->lhd", scores_LHC.softmax(-1), v)
    return outputs
