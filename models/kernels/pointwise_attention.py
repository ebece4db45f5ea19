"""Causal attention without softmax over users of unequal length, as HSTU has it.

Each cell of an event i and an earlier event j of the same user weighs SiLU(q_i . k_j + bias) / max_length, where
the bias depends on how many events and how much time lie between the two. `pointwise_attention` is the one entry: on
an accelerator with Triton it is a jagged kernel (kernels/triton), elsewhere it works on length buckets.
`reference_pointwise_attention` computes user by user and is what both are tested against.

Source: Zhai et al., Actions Speak Louder than Words (2024), with the division by the maximum length of its
published code.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from data_streams.jagged import Jagged
from models.kernels import triton
from models.kernels.length_buckets import BucketLayout, bucket_layout, pair_dtype, to_cells, to_tokens
from models.layers.linear import matmul_dtype

NUM_TIME_BUCKETS = 129
NATS_PER_TIME_BUCKET = 0.301
LATER = -1e4
"""Score of a pair that must not be seen: SiLU and its derivative are exactly 0 there."""


@dataclass(frozen=True, kw_only=True)
class PairBias:
    """What is added to a score because of the distance between two events.

    Shapes: N the configured maximum length.
    """

    by_distance: Tensor | None
    """[N], by the number of events between the two (0 for an event and itself)."""
    by_time: Tensor | None
    """[NUM_TIME_BUCKETS], by the logarithm of the time between the two."""


def time_buckets(query_times_s: Tensor, key_times_s: Tensor) -> Tensor:
    """floor(ln(max(1, |difference|)) / 0.301), at most 128. Shapes: seconds, broadcast -> int64."""
    seconds = (query_times_s - key_times_s).abs().clamp(min=1).float()
    return (seconds.log() / NATS_PER_TIME_BUCKET).long().clamp(max=NUM_TIME_BUCKETS - 1)


@dataclass(frozen=True, kw_only=True)
class EventPairs:
    """Which events of a batch meet, as the kernel of their device wants it; made once for all layers.

    Shapes: T events.
    """

    sequences: Jagged
    """Whose events they are."""
    times_s: Tensor | None
    """[T] int64, where the bias depends on time."""
    layout: BucketLayout | None
    """None where the jagged kernel computes."""
    buckets: list[Tensor] | None = None
    """Of the layout: the time bucket of each pair, [users, length, length] per bucket."""

    @staticmethod
    def build(sequences: Jagged, times_s: Tensor | None) -> "EventPairs":
        if triton.is_available(sequences.offsets.device):
            return EventPairs(sequences=sequences, times_s=times_s, layout=None)
        return EventPairs.in_cells(sequences, times_s, bucket_layout(sequences))

    @staticmethod
    def in_cells(sequences: Jagged, times_s: Tensor | None, layout: BucketLayout) -> "EventPairs":
        buckets = None
        if times_s is not None:
            cells = to_cells(times_s[:, None], layout)
            buckets = [time_buckets(own[:, :, None, 0], own[:, None, :, 0]) for own in cells]
        return EventPairs(sequences=sequences, times_s=times_s, layout=layout, buckets=buckets)


def pointwise_attention(
    packed: Tensor, attention_dim: int, pairs: EventPairs, *, max_length: int, bias: PairBias
) -> Tensor:
    """Sum over the user's events up to each event, with weights that need not sum to one.

    Queries, keys and values lie side by side, as one projection makes them, so that they are moved together.

    Shapes: packed [T, heads, A + A + V] with A = attention_dim -> [T, heads, V].
    """
    if packed.shape[0] == 0:
        # The biases too must have a gradient, or ranks would exchange gradients of unequal size.
        weights = [part for part in (bias.by_distance, bias.by_time) if part is not None]
        return packed[..., 2 * attention_dim :] * packed[..., :1] + sum(part.sum() * 0 for part in weights)
    if pairs.layout is None:
        return _attend_jagged(packed, attention_dim, pairs, max_length, bias)
    return _attend_in_cells(packed, attention_dim, pairs, bias) * (1 / max_length)


def _attend_jagged(
    packed: Tensor, attention_dim: int, pairs: EventPairs, max_length: int, bias: PairBias
) -> Tensor:
    # A machine without an accelerator may not have Triton.
    from models.kernels.triton.pointwise_attention import jagged_pointwise_attention

    return jagged_pointwise_attention(
        packed.to(matmul_dtype(packed)),
        pairs.sequences.offsets,
        pairs.times_s,
        bias.by_distance,
        bias.by_time,
        attention_dim,
        pairs.sequences.max_length,
        1 / max_length,
    )


def _attend_in_cells(packed: Tensor, attention_dim: int, pairs: EventPairs, bias: PairBias) -> Tensor:
    """Before the division by the maximum length."""
    num_heads, layout = packed.shape[1], pairs.layout
    lengths = [length for _, length in layout.buckets]
    shared = _Corners.apply(_shared_bias(bias.by_distance, max(lengths), packed), *lengths)
    blocks = []
    for number, cells in enumerate(to_cells(packed, layout)):
        users, length = layout.buckets[number]
        parts = cells.transpose(1, 2).reshape(users * num_heads, length, -1)
        cell_bias = shared[number]
        if bias.by_time is not None:
            by_time = TakeWeights.apply(bias.by_time, pairs.buckets[number])
            cell_bias = (cell_bias + by_time).repeat_interleave(num_heads, 0)
        attended = _attend(parts, attention_dim, cell_bias)
        blocks.append(attended.view(users, num_heads, length, -1).transpose(1, 2))
    return to_tokens(blocks, layout)


def _attend(parts: Tensor, attention_dim: int, bias: Tensor) -> Tensor:
    """Shapes: parts [n, L, A + A + V], bias [L, L] or [n, L, L] -> [n, L, V]."""
    dtype = pair_dtype(parts, parts.shape[1])
    sizes = (attention_dim, attention_dim, parts.shape[-1] - 2 * attention_dim)
    with torch.autocast(parts.device.type, enabled=False):
        queries, keys, values = parts.to(dtype).split(sizes, -1)
        pairs = bias.to(dtype).expand(parts.shape[0], -1, -1)
        return torch.bmm(F.silu(torch.baddbmm(pairs, queries, keys.transpose(1, 2))), values)


def _shared_bias(by_distance: Tensor | None, length: int, like: Tensor) -> Tensor:
    """The bias that all users share, with later events shut out. Shapes: [N] -> [length, length] fp32."""
    place = torch.arange(length, device=like.device)
    distance = place[:, None] - place
    later = torch.full((length, length), LATER, device=like.device).triu(1)
    if by_distance is None:
        return later
    # A bucket may be a little longer than any history: what lies beyond is filling, and any weight will do.
    return later + by_distance.float()[distance.clamp(min=0, max=by_distance.shape[0] - 1)].tril()


class _Corners(torch.autograd.Function):
    """The upper left corner of a matrix at several sizes; their gradients are added up in one buffer."""

    @staticmethod
    def forward(ctx, matrix: Tensor, *sizes: int) -> tuple[Tensor, ...]:
        ctx.sizes = sizes
        return tuple(matrix[:size, :size].clone() for size in sizes)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        longest = max(ctx.sizes)
        total = gradients[0].new_zeros(longest, longest)
        for size, gradient in zip(ctx.sizes, gradients, strict=True):
            total[:size, :size] += gradient
        return total, *(None for _ in ctx.sizes)


class TakeWeights(torch.autograd.Function):
    """weights[index]; going back is a count with weights. Shapes: weights [K], index [users, ...]."""

    @staticmethod
    def forward(ctx, weights: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_weights = weights.shape[0]
        return weights.float()[index]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (index,) = ctx.saved_tensors
        if gradient.device.type == "cpu":
            # An index_add would take many times as long.
            counts = index.flatten().bincount(gradient.flatten(), minlength=ctx.num_weights)
            return counts.to(gradient), None
        # There the host would wait for the largest index. Each user has sums of its own, so that fewer additions meet.
        sums = gradient.new_zeros(index.shape[0], ctx.num_weights)
        return sums.scatter_add_(1, index.flatten(1), gradient.flatten(1)).sum(0), None


def reference_pointwise_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sequences: Jagged,
    *,
    max_length: int,
    bias: PairBias,
    times_s: Tensor | None,
) -> Tensor:
    """The same, user by user and written out; `times_s` [T] are the times of the events."""
    outputs = []
    for start, stop in pairwise(sequences.offsets.tolist()):
        q, k, v = (part[start:stop].transpose(0, 1) for part in (queries, keys, values))
        place = torch.arange(stop - start)
        scores_HTT = q @ k.transpose(1, 2)
        if bias.by_distance is not None:
            scores_HTT = scores_HTT + bias.by_distance[(place[:, None] - place).clamp(min=0)]
        if bias.by_time is not None:
            own = times_s[start:stop]
            scores_HTT = scores_HTT + bias.by_time[time_buckets(own[:, None], own)]
        visible = place[:, None] >= place
        weights = F.silu(scores_HTT) / max_length * visible
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)
