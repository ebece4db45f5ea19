"""Causal softmax attention over users of unequal length.

`jagged_attention` is the one entry. On the processor, users of similar length share a bucket, so that at most a
tenth of the cells inside attention is padding; `reference_attention` computes user by user and is what the
buckets are tested against. On an accelerator, users are laid out in one padded block (no host sync); a jagged
kernel for it belongs in kernels/triton.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_streams.jagged import Jagged

MAX_PADDING = 0.1


@dataclass(frozen=True, kw_only=True)
class BucketLayout:
    """Where each token lies once users are grouped by length.

    Shapes: T tokens, C >= T cells of all buckets, side by side.
    """

    token_of_cell: Tensor
    """[C] int64; padding cells point at token 0, which no real cell can see."""
    cell_of_token: Tensor
    """[T] int64."""
    buckets: tuple[tuple[int, int], ...]
    """(users, length) of each bucket, in the order of the cells."""


def attention_layout(sequences: Jagged) -> BucketLayout:
    """Group users by length; computed once per batch and shared by all layers."""
    if sequences.offsets.device.type != "cpu":
        return _padded_layout(sequences)
    offsets = sequences.offsets.numpy()
    lengths = np.diff(offsets)
    users = np.argsort(-lengths, kind="stable")[: int((lengths > 0).sum())]
    buckets = _group_lengths(lengths[users])
    widths = np.repeat([length for _, length in buckets], [count for count, _ in buckets]).astype(np.int64)
    starts = np.cumsum(widths) - widths
    within = np.arange(int(widths.sum())) - np.repeat(starts, widths)
    is_token = within < np.repeat(lengths[users], widths)
    token_of_cell = np.where(is_token, np.repeat(offsets[users], widths) + within, 0)
    cell_of_token = np.empty(int(offsets[-1]), dtype=np.int64)
    cell_of_token[token_of_cell[is_token]] = np.flatnonzero(is_token)
    return BucketLayout(
        token_of_cell=torch.from_numpy(token_of_cell),
        cell_of_token=torch.from_numpy(cell_of_token),
        buckets=tuple(buckets),
    )


def _group_lengths(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Cut lengths in descending order into (users, longest) groups with at most MAX_PADDING of empty cells."""
    distinct, counts = np.unique(lengths, return_counts=True)
    groups: list[tuple[int, int]] = []
    users = tokens = longest = 0
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        if users and tokens + length * count < (1 - MAX_PADDING) * longest * (users + count):
            groups.append((users, longest))
            users = tokens = 0
        longest = longest if users else length
        users, tokens = users + count, tokens + length * count
    return [*groups, (users, longest)] if users else groups


def _padded_layout(sequences: Jagged) -> BucketLayout:
    device, width = sequences.offsets.device, max(sequences.max_length, 1)
    within = torch.arange(width, device=device)
    cells = torch.where(
        within < sequences.lengths[:, None], sequences.offsets[:-1, None] + within, torch.zeros_like(within)
    )
    rows = sequences.row_index()
    positions = torch.arange(rows.shape[0], device=device) - sequences.offsets[rows]
    return BucketLayout(
        token_of_cell=cells.flatten(),
        cell_of_token=rows * width + positions,
        buckets=((sequences.num_rows, width),),
    )


class _Rearrange(torch.autograd.Function):
    """Rows of `source` in the order `index`; going back is a gather too, since no row is used twice."""

    @staticmethod
    def forward(ctx, source: Tensor, index: Tensor, inverse: Tensor, zero_from: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, inverse, zero_from)
        return source.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        _, inverse, is_padding = ctx.saved_tensors
        back = gradient.index_select(0, inverse)
        return (back if is_padding is None else back.masked_fill(is_padding, 0)), None, None, None


def jagged_attention(queries: Tensor, keys: Tensor, values: Tensor, layout: BucketLayout) -> Tensor:
    """Each token attends to itself and to the earlier tokens of its user.

    Shapes: queries, keys, values [T, heads, D] -> [T, heads, D].
    """
    num_tokens, num_heads, dim = queries.shape
    if num_tokens == 0:
        return queries * keys * values
    stacked = torch.stack((queries, keys, values), dim=1).flatten(1)
    cells = _Rearrange.apply(stacked, layout.token_of_cell, layout.cell_of_token, None)
    outputs = []
    for part, (users, length) in zip(
        cells.split([users * length for users, length in layout.buckets]), layout.buckets, strict=True
    ):
        attended = _causal_attention(*part.view(users, length, 3, num_heads, dim).permute(2, 0, 3, 1, 4))
        outputs.append(attended.transpose(1, 2).reshape(users * length, num_heads * dim))
    padding = _padding_cells(layout, num_tokens)
    tokens = _Rearrange.apply(torch.cat(outputs), layout.cell_of_token, layout.token_of_cell, padding)
    return tokens.view(num_tokens, num_heads, dim)


def _causal_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Shapes: [users, heads, L, D] each -> [users, heads, L, D]."""
    users, num_heads, length, dim = queries.shape
    if queries.device.type != "cpu":
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    # In fp32, since bf16 products of a shape not met before are compiled first, and every step brings new shapes.
    q, k, v = (part.reshape(users * num_heads, length, dim).float() for part in (queries, keys, values))
    later = torch.full((length, length), float("-inf")).triu(1)
    with torch.autocast("cpu", enabled=False):
        weights = torch.baddbmm(later, q, k.transpose(1, 2), alpha=dim**-0.5).softmax(-1)
        return torch.bmm(weights, v).view(users, num_heads, length, dim)


def _padding_cells(layout: BucketLayout, num_tokens: int) -> Tensor | None:
    """Which cells hold no token [C, 1], or None where every cell holds one."""
    num_cells = layout.token_of_cell.shape[0]
    if num_cells == num_tokens:
        return None
    padding = torch.ones(num_cells, 1, dtype=torch.bool, device=layout.token_of_cell.device)
    padding[layout.cell_of_token] = False
    return padding


def reference_attention(queries: Tensor, keys: Tensor, values: Tensor, sequences: Jagged) -> Tensor:
    """The same, user by user and written out: softmax(q k^T / sqrt(D)) v over the tokens up to each token.

    Shapes: queries, keys, values [T, heads, D] -> [T, heads, D].
    """
    outputs = []
    bounds = sequences.offsets.tolist()
    for start, stop in pairwise(bounds):
        q, k, v = (part[start:stop].transpose(0, 1) for part in (queries, keys, values))
        scores_HTT = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
        weights = scores_HTT.masked_fill(later, float("-inf")).softmax(-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)
