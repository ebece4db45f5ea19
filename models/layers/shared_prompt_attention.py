"""Attention of many queries of a user over one copy of that user's prompt, and over few keys of their own."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import DataError
from data_streams.jagged import Jagged
from models.kernels.length_buckets import BucketLayout, bucket_layout, in_order, padded_layout, to_cells


@dataclass(frozen=True, kw_only=True)
class PromptLayout:
    """How prompts of unequal length lie in buckets of similar length; made once per batch for all layers.

    Shapes: B users.
    """

    cells: BucketLayout
    order: Tensor | None
    """[B] int64: users in the order of the buckets; None where that is their own order."""
    place: Tensor | None
    """[B] int64: where each user went."""
    padding: tuple[Tensor | None, ...]
    """By bucket: [users, 1, 1, length] fp32, -inf at cells behind a prompt; None where there are none."""

    @staticmethod
    def build(prompts: Jagged) -> "PromptLayout":
        """Raises: DataError where a prompt is empty; not asked on an accelerator, which it would have to wait for."""
        # One empty bucket for a batch without users keeps keys and values attached to the graph.
        cells = bucket_layout(prompts) if prompts.num_rows else padded_layout(prompts)
        lengths = prompts.lengths
        on_host = lengths.device.type == "cpu"
        if on_host and prompts.num_rows and int(lengths.min()) == 0:
            raise DataError(
                "a prompt must have at least one token, and some are empty; leave out users without any event, or "
                "begin prompts with a token of their own"
            )
        order = _order_of_users(prompts, cells) if on_host else None
        return PromptLayout(
            cells=cells,
            order=order,
            place=None if order is None else order.argsort(),
            padding=tuple(_padding(cells, lengths if order is None else lengths[order])),
        )


def _order_of_users(prompts: Jagged, cells: BucketLayout) -> Tensor | None:
    """Users in the order of the buckets; None where that is their own."""
    rows, firsts, done = prompts.row_index(), [], 0
    for users, length in cells.buckets:
        firsts.append(done + length * torch.arange(users))
        done += users * length
    order = rows[cells.token_of_cell[torch.cat(firsts)]]
    return None if torch.equal(order, torch.arange(len(order))) else order


def _padding(cells: BucketLayout, lengths: Tensor) -> Iterator[Tensor | None]:
    """Shapes: lengths [B] in the order of the buckets."""
    parts = lengths.split([users for users, _ in cells.buckets])
    for part, (_, length) in zip(parts, cells.buckets, strict=True):
        beyond = torch.arange(length, device=lengths.device) >= part[:, None]
        bias = torch.zeros(beyond.shape, device=lengths.device).masked_fill_(beyond, float("-inf"))
        yield None if beyond.device.type == "cpu" and not beyond.any() else bias[:, None, None]


@dataclass(frozen=True, kw_only=True)
class PromptKeyValues:
    """Keys and values of one layer, once per user."""

    layout: PromptLayout
    keys: tuple[Tensor, ...]
    """By bucket: [users, heads, length, D]."""
    values: tuple[Tensor, ...]

    @staticmethod
    def build(keys: Tensor, values: Tensor, layout: PromptLayout) -> "PromptKeyValues":
        """Shapes: keys and values [T, heads, D] of all prompt tokens."""
        by_head = lambda tokens: tuple(  # noqa: E731
            cells.transpose(1, 2).contiguous() for cells in to_cells(tokens, layout.cells)
        )
        return PromptKeyValues(layout=layout, keys=by_head(keys), values=by_head(values))


@dataclass(frozen=True, kw_only=True)
class SuffixKeyValues:
    """Keys and values of one layer that belong to single prefixes. Shapes: W prefixes with S keys each."""

    keys: Tensor
    """[B, W, S, heads, D]."""
    values: Tensor
    """[B, W, S, heads, D]."""

    @staticmethod
    def append(before: "SuffixKeyValues | None", keys: Tensor, values: Tensor) -> "SuffixKeyValues":
        """One more key for each prefix. Shapes: keys and values [B, W, heads, D]."""
        keys, values = keys[:, :, None], values[:, :, None]
        if before is not None:
            keys = torch.cat((before.keys, keys), dim=2)
            values = torch.cat((before.values, values), dim=2)
        return SuffixKeyValues(keys=keys, values=values)

    def reorder(self, parents: Tensor) -> "SuffixKeyValues":
        """Shapes: parents [B, W'] in 0..W-1."""
        num_users, width = self.keys.shape[:2]
        firsts = torch.arange(num_users, device=parents.device)[:, None] * width
        rows = (firsts + parents).flatten()
        take = lambda all_rows: all_rows.flatten(0, 1)[rows].unflatten(0, parents.shape)  # noqa: E731
        return SuffixKeyValues(keys=take(self.keys), values=take(self.values))


def shared_prompt_attention(
    queries: Tensor,
    prompt: PromptKeyValues,
    suffix: SuffixKeyValues | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of W queries per user over the user's whole prompt and each query's own suffix.

    A user's keys are read once for all queries: one product per length bucket. Without a suffix this is the
    cross-attention of an encoder-decoder model.

    Shapes: queries [B, W, heads, D] -> [B, W, heads, D].
    """
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    layout, scaled = prompt.layout, queries * scale
    ordered = _by_bucket(scaled.transpose(1, 2), layout)
    suffix_scores = suffix_values = [None] * len(ordered)
    if suffix is not None:
        scores = (scaled[:, :, None] * suffix.keys).sum(-1)
        suffix_scores = _by_bucket(scores.permute(0, 3, 1, 2), layout)
        suffix_values = _by_bucket(suffix.values.permute(0, 3, 1, 2, 4), layout)
    blocks = [
        _attend_bucket(*parts)
        for parts in zip(
            ordered, prompt.keys, prompt.values, layout.padding, suffix_scores, suffix_values, strict=True
        )
    ]
    attended = torch.cat(blocks)
    if layout.order is not None:
        attended = in_order(attended, layout.place, layout.order)
    return attended.transpose(1, 2)


def suffix_attention(queries: Tensor, suffix: SuffixKeyValues) -> Tensor:
    """Softmax attention of each query over its own suffix alone.

    Shapes: queries [B, W, heads, D] -> [B, W, heads, D].
    """
    scores = (queries[:, :, None] * suffix.keys).sum(-1) * queries.shape[-1] ** -0.5
    weights = scores.float().softmax(2).to(suffix.values.dtype)
    return (weights[..., None] * suffix.values).sum(2)


def _by_bucket(users: Tensor, layout: PromptLayout) -> tuple[Tensor, ...]:
    ordered = users if layout.order is None else in_order(users, layout.order, layout.place)
    return ordered.split([count for count, _ in layout.cells.buckets])


def _attend_bucket(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    padding: Tensor | None,
    suffix_scores: Tensor | None,
    suffix_values: Tensor | None,
) -> Tensor:
    """Shapes: queries [u, heads, W, D], keys and values [u, heads, P, D], suffix_scores [u, heads, W, S],
    suffix_values [u, heads, W, S, D] -> [u, heads, W, D]."""
    scores = queries @ keys.transpose(-1, -2)
    if padding is not None:
        scores = scores + padding
    if suffix_scores is None:
        return scores.softmax(-1).to(values.dtype) @ values
    length = scores.shape[-1]
    weights = torch.cat((scores, suffix_scores.to(scores.dtype)), dim=-1).softmax(-1).to(values.dtype)
    own = (weights[..., length:, None] * suffix_values).sum(-2)
    return weights[..., :length] @ values + own
