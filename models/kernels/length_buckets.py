"""Users of unequal length grouped into buckets of similar length, for kernels over pairs of events.

On the processor, users of similar length share a bucket, so that at most a tenth of the cells is padding. On an
accelerator all users are laid out in one padded block, which needs no host sync, for the kernels that are not jagged.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_streams.jagged import Jagged
from models.layers.linear import matmul_dtype

MAX_PADDING = 0.1
SHORT_LENGTH = 32


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Where users begin and end, as jagged kernels want it."""

    offsets: Tensor
    """[users + 1] int32."""
    longest: int
    """No user is longer."""


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
    is_identity: bool = False
    """Whether every token lies in the cell of its own number, as with rows of one length: nothing has to move then."""
    bounds: Bounds | None = None
    """On an accelerator, for jagged kernels: where the users begin and end."""


def bucket_layout(sequences: Jagged) -> BucketLayout:
    """Group users by length; computed once per batch and shared by all layers."""
    if sequences.offsets.device.type != "cpu":
        return padded_layout(sequences)
    offsets = sequences.offsets.numpy()
    lengths = np.diff(offsets)
    users = np.argsort(-lengths, kind="stable")[: int((lengths > 0).sum())]
    return _layout_of(offsets, users, _group_lengths(lengths[users]))


def following_layout(sequences: Jagged, layout: BucketLayout, others: Jagged) -> BucketLayout:
    """Rows of other lengths grouped like those of `sequences`: the same users in the same buckets and order."""
    if sequences.offsets.device.type != "cpu":
        return padded_layout(others)
    rows, offsets = sequences.row_index()[layout.token_of_cell].numpy(), others.offsets.numpy()
    users, buckets, cell = [np.zeros(0, dtype=np.int64)], [], 0
    for count, length in layout.buckets:
        users.append(rows[cell : cell + count * length : length])
        buckets.append((count, int(np.diff(offsets)[users[-1]].max())))
        cell += count * length
    return _layout_of(offsets, np.concatenate(users), buckets)


def _layout_of(offsets: np.ndarray, users: np.ndarray, buckets: list[tuple[int, int]]) -> BucketLayout:
    """Cells of users in a given order. Shapes: offsets [B + 1], users [users of all buckets]."""
    lengths = np.diff(offsets)
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
        is_identity=np.array_equal(token_of_cell, np.arange(len(cell_of_token))),
    )


def _group_lengths(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Cut lengths in descending order into (users, length) groups with at most MAX_PADDING of empty cells.

    On a processor the library compiles code for every shape of bf16 products and keeps a limited number of them.
    So lengths are rounded up by at most a sixteenth, and the users of a group come in powers of two; short
    sequences, which are not worth it, stay together and are computed in fp32.
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    groups: list[tuple[int, int]] = []
    users = tokens = longest = 0
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        if users and tokens + length * count < (1 - MAX_PADDING) * longest * (users + count):
            groups.append((users, longest))
            users = tokens = 0
        longest = longest if users else round_up(length)
        users, tokens = users + count, tokens + length * count
    if users:
        groups.append((users, longest))
    return [
        (part, length)
        for users, length in groups
        for part in ([users] if length <= SHORT_LENGTH else _powers_of_two(users))
    ]


def round_up(length: int) -> int:
    """Keep the five leading bits. Example: 31 -> 31, 33 -> 34, 129 -> 136."""
    unit = 1 << max(length.bit_length() - 5, 0)
    return -(-length // unit) * unit


def _powers_of_two(number: int) -> list[int]:
    """Example: 13 -> 8, 4, 1."""
    return [1 << bit for bit in reversed(range(number.bit_length())) if number >> bit & 1]


def padded_layout(sequences: Jagged) -> BucketLayout:
    """All users in one bucket as long as the longest of them."""
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
        bounds=Bounds(offsets=sequences.offsets.int(), longest=width),
    )


class _Rearrange(torch.autograd.Function):
    """Rows of `source` in the order `index`; going back is a gather too, since no row is used twice."""

    @staticmethod
    def forward(ctx, source: Tensor, index: Tensor, inverse: Tensor, zero_from: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, inverse, zero_from)
        return _take(source, index)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        _, inverse, is_padding = ctx.saved_tensors
        back = _take(gradient, inverse)
        return (back if is_padding is None else back.masked_fill(is_padding, 0)), None, None, None


def in_order(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """The rows in another order. Going back is a gather too, where that of an index adds row by row.

    Shapes: rows [n, ...], order and inverse [n] int64 -> [n, ...].
    """
    return _Rearrange.apply(rows, order, inverse, None)


def _take(source: Tensor, index: Tensor) -> Tensor:
    """Rows of `source`; zeros where it has none: the cells of users without any token are all padding."""
    if source.shape[0] == 0:
        return source.new_zeros(index.shape[0], *source.shape[1:])
    return source.index_select(0, index)


def to_cells(tokens: Tensor, layout: BucketLayout) -> Iterator[Tensor]:
    """One block of cells per bucket. Shapes: tokens [T, ...] -> [users, length, ...] each."""
    cells = tokens
    if not layout.is_identity:
        cells = _Rearrange.apply(tokens.flatten(1), layout.token_of_cell, layout.cell_of_token, None)
    sizes = [users * length for users, length in layout.buckets]
    # The way back through a split of one part would copy it.
    parts = cells.split(sizes) if len(sizes) != 1 else (cells,)
    for part, (users, length) in zip(parts, layout.buckets, strict=True):
        yield part.view(users, length, *tokens.shape[1:])


def to_tokens(blocks: list[Tensor], layout: BucketLayout) -> Tensor:
    """The way back from `to_cells`; what stands in padding cells is dropped.

    Shapes: [users, length, ...] -> [T, ...].
    """
    flat = [block.reshape(-1, *block.shape[2:]).flatten(1) for block in blocks]
    cells = torch.cat(flat) if len(flat) != 1 else flat[0]
    if not layout.is_identity:
        cells = _Rearrange.apply(cells, layout.cell_of_token, layout.token_of_cell, padding_cells(layout))
    return cells.view(-1, *blocks[0].shape[2:])


def pair_dtype(cells: Tensor, length: int) -> torch.dtype:
    """In what to compute products over pairs of events of a bucket."""
    if cells.device.type == "cpu" and length <= SHORT_LENGTH:
        return torch.float32
    return matmul_dtype(cells)


def padding_cells(layout: BucketLayout) -> Tensor | None:
    """Which cells hold no token [C, 1], or None where every cell holds one."""
    num_cells = layout.token_of_cell.shape[0]
    if num_cells == layout.cell_of_token.shape[0]:
        return None
    padding = torch.ones(num_cells, 1, dtype=torch.bool, device=layout.token_of_cell.device)
    padding[layout.cell_of_token] = False
    return padding
