"""The pointwise attention of HSTU over packed users as Triton kernels: no cell of padding and no score in memory.

A program of the forward kernel has a block of queries of one head of one user, walks over the blocks of keys before it
and adds up what they weigh. Going back, one kernel walks over queries for a block of keys, one over keys for a block
of queries, and one adds the gradients of the biases of all heads before it scatters them, user by user. Scores are
computed anew in each. Biases are looked up by the pair's distance and time where they are needed.

Imported only where it runs: on an accelerator, and by tests in Triton's interpreter. What Triton compiles is marked
`no_type_check`, since the tests wrap functions to check types and Triton cannot compile a wrapped one.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models.kernels.pointwise_attention import NATS_PER_TIME_BUCKET, NUM_TIME_BUCKETS

BUCKETS_PER_NAT = tl.constexpr(1 / NATS_PER_TIME_BUCKET)
LARGEST_S = tl.constexpr(2**31 - 1)
LAST_TIME_BUCKET = tl.constexpr(NUM_TIME_BUCKETS - 1)
SMALLEST_BLOCK = 16
"""What a product on a matrix unit takes at least."""
BLOCK = 32
"""Queries and keys of a block of cells. Blocks of 64 and 128 took 1.2 to 3 times as long on an H100, since the work on
single cells is the most of it and those above the diagonal are computed for nothing."""


@triton.jit
@no_type_check
def _load(base, rows, length, stride, width, BLOCK: tl.constexpr):
    """Rows of one head; zeros beyond the user's events and beyond the head's width."""
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < length) & (columns[None, :] < width)
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def _store(base, rows, length, stride, width, values, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < length) & (columns[None, :] < width)
    places = base + rows[:, None] * stride + columns[None, :]
    tl.store(places, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _events_of(offsets, user):
    """Where the events of a user begin, and how many there are."""
    start = tl.load(offsets + user)
    return start, (tl.load(offsets + user + 1) - start).to(tl.int32)


@triton.jit
@no_type_check
def _distances(queries, keys, last):
    return tl.minimum(tl.maximum(queries[:, None] - keys[None, :], 0), last)


@triton.jit
@no_type_check
def _since_first(times, events, length):
    """In 32 bits, since numbers of 64 bits take twice the registers and many times as long to round to fp32."""
    since = tl.load(times + events, mask=events < length, other=0) - tl.load(times)
    return tl.minimum(since, LARGEST_S).to(tl.int32)


@triton.jit
@no_type_check
def _time_buckets(times, queries, keys, length):
    """As `models.kernels.pointwise_attention.time_buckets`, of one user's events; what lies more than 2^31 s (68 years)
    behind the first counts as if it lay so far behind.
    """
    own = _since_first(times, queries, length)
    earlier = _since_first(times, keys, length)
    seconds = tl.maximum(tl.abs(own[:, None] - earlier[None, :]), 1).to(tl.float32)
    return tl.minimum((tl.log(seconds) * BUCKETS_PER_NAT).to(tl.int32), LAST_TIME_BUCKET)


@triton.jit
@no_type_check
def _scores(q, k, queries, keys, length, times, by_distance, last_distance, by_time, PRECISION: tl.constexpr):
    """Products and biases of a block of cells, and which of them are pairs of an event and an earlier one."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if by_distance is not None:
        scores += tl.load(by_distance + _distances(queries, keys, last_distance)).to(tl.float32)
    if by_time is not None:
        scores += tl.load(by_time + _time_buckets(times, queries, keys, length)).to(tl.float32)
    return scores, (queries[:, None] >= keys[None, :]) & (queries[:, None] < length)


@triton.jit
@no_type_check
def _weights(scores, visible):
    """SiLU; zero for what is not seen."""
    return tl.where(visible, scores * tl.sigmoid(scores), 0.0)


@triton.jit
@no_type_check
def _slope(scores, visible):
    """The derivative of `_weights`."""
    gate = tl.sigmoid(scores)
    return tl.where(visible, gate * (1 + scores * (1 - gate)), 0.0)


@triton.jit
@no_type_check
def _forward(
    packed, offsets, times, by_distance, last_distance, by_time, scale, num_heads, output,
    A: tl.constexpr, V: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    user, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    start, length = _events_of(offsets, user)
    first = tl.program_id(1) * BLOCK
    if first >= length:
        return
    stride = num_heads * (2 * A + V)
    base = packed + start * stride + head * (2 * A + V)
    if by_time is not None:
        times += start
    queries = first + tl.arange(0, BLOCK)
    q = _load(base, queries, length, stride, A, BLOCK_A)
    total = tl.zeros((BLOCK, BLOCK_V), dtype=tl.float32)
    for begin in range(0, first + BLOCK, BLOCK):
        keys = begin + tl.arange(0, BLOCK)
        k = _load(base + A, keys, length, stride, A, BLOCK_A)
        v = _load(base + 2 * A, keys, length, stride, V, BLOCK_V)
        scores, visible = _scores(
            q, k, queries, keys, length, times, by_distance, last_distance, by_time, PRECISION
        )
        weights = _weights(scores, visible)
        total += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    output += start * num_heads * V + head * V
    _store(output, queries, length, num_heads * V, V, total * scale, BLOCK_V)


@triton.jit
@no_type_check
def _back_to_keys(
    packed, offsets, times, by_distance, last_distance, by_time, scale, num_heads, gradient, packed_gradient,
    A: tl.constexpr, V: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    user, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    start, length = _events_of(offsets, user)
    first = tl.program_id(1) * BLOCK
    if first >= length:
        return
    stride = num_heads * (2 * A + V)
    place = start * stride + head * (2 * A + V)
    base = packed + place
    gradient += start * num_heads * V + head * V
    if by_time is not None:
        times += start
    keys = first + tl.arange(0, BLOCK)
    k = _load(base + A, keys, length, stride, A, BLOCK_A)
    v = _load(base + 2 * A, keys, length, stride, V, BLOCK_V)
    to_keys = tl.zeros((BLOCK, BLOCK_A), dtype=tl.float32)
    to_values = tl.zeros((BLOCK, BLOCK_V), dtype=tl.float32)
    for begin in range(first, length, BLOCK):
        queries = begin + tl.arange(0, BLOCK)
        q = _load(base, queries, length, stride, A, BLOCK_A)
        g = _load(gradient, queries, length, num_heads * V, V, BLOCK_V)
        scores, visible = _scores(
            q, k, queries, keys, length, times, by_distance, last_distance, by_time, PRECISION
        )
        weights = _weights(scores, visible)
        to_values += tl.dot(tl.trans(weights).to(g.dtype), g, input_precision=PRECISION)
        to_scores = tl.dot(g, tl.trans(v), input_precision=PRECISION) * _slope(scores, visible)
        to_keys += tl.dot(tl.trans(to_scores).to(q.dtype), q, input_precision=PRECISION)
    _store(packed_gradient + place + A, keys, length, stride, A, to_keys * scale, BLOCK_A)
    _store(packed_gradient + place + 2 * A, keys, length, stride, V, to_values * scale, BLOCK_V)


@triton.jit
@no_type_check
def _back_to_queries(
    packed, offsets, times, by_distance, last_distance, by_time, scale, num_heads, gradient, packed_gradient,
    A: tl.constexpr, V: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    user, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    start, length = _events_of(offsets, user)
    first = tl.program_id(1) * BLOCK
    if first >= length:
        return
    stride = num_heads * (2 * A + V)
    place = start * stride + head * (2 * A + V)
    base = packed + place
    gradient += start * num_heads * V + head * V
    if by_time is not None:
        times += start
    queries = first + tl.arange(0, BLOCK)
    q = _load(base, queries, length, stride, A, BLOCK_A)
    g = _load(gradient, queries, length, num_heads * V, V, BLOCK_V)
    to_queries = tl.zeros((BLOCK, BLOCK_A), dtype=tl.float32)
    for begin in range(0, first + BLOCK, BLOCK):
        keys = begin + tl.arange(0, BLOCK)
        k = _load(base + A, keys, length, stride, A, BLOCK_A)
        v = _load(base + 2 * A, keys, length, stride, V, BLOCK_V)
        scores, visible = _scores(
            q, k, queries, keys, length, times, by_distance, last_distance, by_time, PRECISION
        )
        to_scores = tl.dot(g, tl.trans(v), input_precision=PRECISION) * _slope(scores, visible)
        to_queries += tl.dot(to_scores.to(k.dtype), k, input_precision=PRECISION)
    _store(packed_gradient + place, queries, length, stride, A, to_queries * scale, BLOCK_A)


@triton.jit
@no_type_check
def _back_to_biases(
    packed, offsets, times, by_distance, last_distance, by_time, scale, num_heads, gradient, to_distance, to_time,
    A: tl.constexpr, V: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each user has sums of its own, so that few additions meet."""
    user, first = tl.program_id(0), tl.program_id(1) * BLOCK
    start, length = _events_of(offsets, user)
    if first >= length:
        return
    stride = num_heads * (2 * A + V)
    base = packed + start * stride
    gradient += start * num_heads * V
    if by_time is not None:
        times += start
    # In 64 bits: users times the configured maximum length may be more than 32 can count.
    if by_distance is not None:
        to_distance += user.to(tl.int64) * (last_distance + 1)
    if by_time is not None:
        to_time += user.to(tl.int64) * (LAST_TIME_BUCKET + 1)
    queries = first + tl.arange(0, BLOCK)
    for begin in range(0, first + BLOCK, BLOCK):
        keys = begin + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for head in range(num_heads):
            own = base + head * (2 * A + V)
            q = _load(own, queries, length, stride, A, BLOCK_A)
            k = _load(own + A, keys, length, stride, A, BLOCK_A)
            v = _load(own + 2 * A, keys, length, stride, V, BLOCK_V)
            g = _load(gradient + head * V, queries, length, num_heads * V, V, BLOCK_V)
            scores, visible = _scores(
                q, k, queries, keys, length, times, by_distance, last_distance, by_time, PRECISION
            )
            total += tl.dot(g, tl.trans(v), input_precision=PRECISION) * _slope(scores, visible)
        total *= scale
        pairs = (queries[:, None] >= keys[None, :]) & (queries[:, None] < length)
        if by_distance is not None:
            place = _distances(queries, keys, last_distance)
            tl.atomic_add(to_distance + place, total, mask=pairs, sem="relaxed")
        if by_time is not None:
            place = _time_buckets(times, queries, keys, length)
            tl.atomic_add(to_time + place, total, mask=pairs, sem="relaxed")


@torch.library.custom_op("grail::jagged_pointwise_attention", mutates_args=())
def jagged_pointwise_attention(
    packed: Tensor,
    offsets: Tensor,
    times_s: Tensor | None,
    by_distance: Tensor | None,
    by_time: Tensor | None,
    attention_dim: int,
    longest: int,
    scale: float,
) -> Tensor:
    """SiLU(q . k + bias) * scale over each user's events up to each; no event lies outside of the users.

    `longest` may be more than the longest user has; `times_s` are needed where there is a bias by time.

    Shapes: packed [T, heads, A + A + V], T > 0, with A = attention_dim; offsets [B + 1]; times_s [T] int64;
    by_distance [N]; by_time [NUM_TIME_BUCKETS] -> [T, heads, V].
    """
    output = packed.new_empty(*packed.shape[:2], packed.shape[2] - 2 * attention_dim)
    arguments = _arguments(packed, offsets, times_s, by_distance, by_time, scale)
    sizes = _sizes(packed, attention_dim)
    users, blocks = offsets.shape[0] - 1, triton.cdiv(longest, BLOCK)
    _forward[(users * packed.shape[1], blocks)](*arguments, output, **sizes, num_warps=_warps(packed)[0])
    return output


@torch.library.custom_op("grail::jagged_pointwise_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    packed: Tensor,
    offsets: Tensor,
    times_s: Tensor | None,
    by_distance: Tensor | None,
    by_time: Tensor | None,
    attention_dim: int,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of packed, by_distance and by_time; of a bias that is not there, a tensor without elements."""
    users, num_heads = offsets.shape[0] - 1, packed.shape[1]
    arguments = _arguments(packed, offsets, times_s, by_distance, by_time, scale)
    sizes = _sizes(packed, attention_dim)
    grid = (users * num_heads, triton.cdiv(longest, BLOCK))
    of_queries, of_keys = _warps(packed)
    gradient = gradient.to(packed.dtype).contiguous()
    to_packed = torch.empty_like(packed, memory_format=torch.contiguous_format)
    _back_to_keys[grid](*arguments, gradient, to_packed, **sizes, num_warps=of_keys)
    _back_to_queries[grid](*arguments, gradient, to_packed, **sizes, num_warps=of_queries)
    to_biases = [
        packed.new_zeros(users, 0 if weights is None else weights.shape[0], dtype=torch.float32)
        for weights in (by_distance, by_time)
    ]
    if by_distance is not None or by_time is not None:
        _back_to_biases[(users, grid[1])](*arguments, gradient, *to_biases, **sizes, num_warps=of_keys)
    return to_packed, to_biases[0].sum(0), to_biases[1].sum(0)


def _arguments(packed: Tensor, offsets: Tensor, times_s, by_distance, by_time, scale: float) -> tuple:
    last_distance = 0 if by_distance is None else by_distance.shape[0] - 1
    return packed.contiguous(), offsets, times_s, by_distance, last_distance, by_time, scale, packed.shape[1]


def _sizes(packed: Tensor, attention_dim: int) -> dict:
    """What a kernel is compiled for."""
    value_dim = packed.shape[2] - 2 * attention_dim
    block_a, block_v = (
        max(SMALLEST_BLOCK, triton.next_power_of_2(size)) for size in (attention_dim, value_dim)
    )
    exact = torch.get_float32_matmul_precision() == "highest"
    return {
        "A": attention_dim,
        "V": value_dim,
        "BLOCK_A": block_a,
        "BLOCK_V": block_v,
        "BLOCK": BLOCK,
        "PRECISION": "ieee" if exact else "tf32",
        # Loaded ahead too, rows of single precision this wide would need more memory than a block of threads has.
        "num_stages": 1 if packed.dtype == torch.float32 and max(block_a, block_v) >= 128 else 3,
    }


def _warps(packed: Tensor) -> tuple[int, int]:
    """Of the kernels for a block of queries, and of the other two: the best on an H100 for heads of 32 and 64 in half
    precision; more where the numbers of a block would not fit into the registers."""
    if packed.dtype == torch.float32:
        return 8, 8
    return 4, 2 if packed.shape[2] <= 3 * 64 else 4


@jagged_pointwise_attention.register_fake
def _(packed, offsets, times_s, by_distance, by_time, attention_dim, longest, scale):
    return packed.new_empty(*packed.shape[:2], packed.shape[2] - 2 * attention_dim)


@_backward.register_fake
def _(gradient, packed, offsets, times_s, by_distance, by_time, attention_dim, longest, scale):
    sizes = (0 if weights is None else weights.shape[0] for weights in (by_distance, by_time))
    to_packed = torch.empty_like(packed, memory_format=torch.contiguous_format)
    return to_packed, *(packed.new_empty(size, dtype=torch.float32) for size in sizes)


def _remember(ctx, inputs, output) -> None:
    *tensors, ctx.attention_dim, ctx.longest, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, gradient: Tensor) -> tuple:
    *_, by_distance, by_time = saved = ctx.saved_tensors
    found = _backward(gradient, *saved, ctx.attention_dim, ctx.longest, ctx.scale)
    to_packed, *to_biases = found
    biases = (
        None if weights is None else sums.to(weights.dtype)
        for weights, sums in zip((by_distance, by_time), to_biases, strict=True)
    )
    return to_packed, None, None, *biases, None, None, None


jagged_pointwise_attention.register_autograd(_differentiate, setup_context=_remember)


@register_flop_formula(torch.ops.grail.jagged_pointwise_attention, get_raw=True)
def _operations(packed, offsets, times_s, by_distance, by_time, attention_dim, *_, **__) -> int:
    """Two products of every pair of events."""
    return 2 * _pairs(offsets) * packed.shape[1] * (packed.shape[2] - attention_dim)


@register_flop_formula(torch.ops.grail.jagged_pointwise_attention_backward, get_raw=True)
def _operations_back(
    gradient, packed, offsets, times_s, by_distance, by_time, attention_dim, *_, **__
) -> int:
    """Five products, of which that of the scores is computed once more than going forward."""
    return 2 * _pairs(offsets) * packed.shape[1] * (2 * packed.shape[2] - attention_dim)


def _pairs(offsets: Tensor) -> int:
    """How many pairs of an event and itself or an earlier one there are."""
    lengths = offsets.diff()
    return int((lengths * (lengths + 1) // 2).sum())
