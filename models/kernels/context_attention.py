"""Softmax attention of what is to be predicted over what is known of its user, both of unequal length.

Every key says from which position of a target on it is known, and at which one it is forgotten again. So one copy
of a user's keys serves all targets of that user, each with the part of the past it may see. `context_attention`
works on length buckets; `reference_context_attention` computes target by target and is what it is tested against.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_streams.jagged import Jagged
from models.kernels.few_queries import SharedContext
from models.kernels.length_buckets import (
    BucketLayout,
    bucket_layout,
    following_layout,
    padding_cells,
    pair_dtype,
    to_cells,
    to_tokens,
)
from models.layers.linear import without_autocast

NEVER = torch.iinfo(torch.int64).max
"""A position that no target has."""


@dataclass(frozen=True, kw_only=True)
class ContextLayout:
    """Where keys and targets lie, made once per batch for all layers. Shapes: C keys, N targets."""

    keys: BucketLayout
    targets: BucketLayout
    hidden: tuple[Tensor, ...]
    """By bucket: [users, targets, keys] bool, what a target may not see."""

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
            hidden.append((at < first) | (at >= last))
        return ContextLayout(keys=keys, targets=targets, hidden=tuple(hidden))


@dataclass(frozen=True, kw_only=True)
class ContextCells:
    """Keys and values as they lie in the buckets: laid out once, read by many layers."""

    buckets: tuple["SharedContext | GroupedContext", ...]
    whole: tuple[Tensor, Tensor]
    """What they were made of, [C, groups, D] each."""

    @staticmethod
    def build(keys: Tensor, values: Tensor, layout: ContextLayout) -> "ContextCells":
        """Shapes: keys and values [C, groups, D]."""
        one_each = all(length == 1 for _, length in layout.targets.buckets)
        kind = SharedContext if keys.device.type == "cpu" and one_each else GroupedContext
        cells = (
            (part.to(pair_dtype(part, part.shape[1])) for part in to_cells(tokens, layout.keys))
            for tokens in (keys, values)
        )
        buckets = tuple(kind(*both) for both in zip(*cells, strict=True))
        return ContextCells(buckets=buckets, whole=(keys, values))


class GroupedContext:
    """Keys and values of users by group, so that each has a product of its own."""

    def __init__(self, keys: Tensor, values: Tensor):
        """Shapes: keys and values [users, C, groups, D]."""
        self.keys, self.values = (part.transpose(1, 2).contiguous() for part in (keys, values))

    def attend(self, queries: Tensor, hidden: Tensor) -> Tensor:
        """Shapes: queries [users, N, L, heads, D], hidden [users, N, C] bool -> [users, N, L, heads, D]."""
        users, num_targets, num_codes, heads, dim = queries.shape
        groups = self.keys.shape[1]
        with without_autocast(queries):
            shared = queries.unflatten(3, (groups, -1)).permute(0, 3, 1, 4, 2, 5)
            scores = (
                shared.flatten(2, 4).to(self.keys.dtype) @ self.keys.transpose(2, 3)
            ).float() * dim**-0.5
            rows = scores.view(users, groups, num_targets, heads // groups * num_codes, scores.shape[-1])
            # Not -inf: padding targets see nothing, and would be NaN.
            weights = rows.masked_fill(hidden[:, None, :, None], torch.finfo(torch.float32).min).softmax(-1)
            attended = (weights.view_as(scores).to(self.values.dtype) @ self.values).to(queries.dtype)
        apart = attended.view(users, groups, num_targets, heads // groups, num_codes, dim)
        return apart.permute(0, 2, 4, 1, 3, 5).reshape(queries.shape)


def context_attention(queries: Tensor, context: ContextCells, layout: ContextLayout) -> Tensor:
    """Every target must see at least one key. With fewer groups of keys than heads, neighbouring heads share one.

    Shapes: queries [N, L, heads, D] -> [N, L, heads, D].
    """
    if queries.shape[0] == 0:
        return queries + 0 * sum(part.sum() for part in context.whole)
    cells = to_cells(queries, layout.targets)
    blocks = [own.attend(*parts) for own, *parts in zip(context.buckets, cells, layout.hidden, strict=True)]
    return to_tokens(blocks, layout.targets)


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
