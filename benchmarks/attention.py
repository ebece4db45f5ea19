"""Attention over users of unequal length, forward and backward, against the same on users padded to the longest."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.setting.benchmark import Bar, Benchmark, Request, compare_times
from benchmarks.setting.long_users import LongUsers
from benchmarks.setting.timing import interleave
from cluster.process import Process
from data_streams.jagged import Jagged
from models.kernels.jagged_attention import jagged_attention
from models.kernels.length_buckets import bucket_layout, padded_layout
from models.kernels.pointwise_attention import NUM_TIME_BUCKETS, EventPairs, PairBias, pointwise_attention
from trainer.dense_module import resolve_precision

BENCHMARK = Benchmark(
    unit="s, where it gains least",
    bars=(Bar(key="ratio", at_most=1.0),),
    threads_per_rank=2,
    on_accelerator=True,
)
LONGEST = {"full": (200, 800), "small": (40,), "accelerator": (200, 1000, 3000)}
"""Lengths are those of MovieLens-1M, stretched: the longest of 200 is its own."""
EVENTS = {"full": 2**14, "small": 2**8, "accelerator": 2**17}
"""About so many of all users."""
SHAPES = {"full": (2, 32), "small": (2, 8), "accelerator": (4, 64)}
"""Heads, and the width of each."""
ROUNDS = {"full": 5, "small": 1, "accelerator": 10}


def measure(process: Process, request: Request) -> dict[str, Any]:
    """`pointwise` is HSTU's, with biases by distance and time; `softmax` is that of SASRec and the decoders. Both have
    the operators that torch has for the padded users, and on an accelerator our times include nothing of their layout.
    """
    sides, cases = {}, {}
    for longest in LONGEST[request.scale]:
        users = _users(longest, EVENTS[request.scale]).to(process.device)
        for name, make in (("pointwise", _pointwise), ("softmax", _softmax)):
            for padded in (False, True):
                sides[f"{name} {longest}", padded] = make(users, *SHAPES[request.scale], padded)
    timings = interleave(process, sides, rounds=ROUNDS[request.scale])
    for name in dict.fromkeys(name for name, _ in sides):
        memory = {"ours": _peak_mib(sides[name, False]), "peer": _peak_mib(sides[name, True])}
        cases[name] = compare_times(timings[name, False], timings[name, True]) | {"peak_mib": memory}
    worst = max(cases.values(), key=lambda case: case["ratio"])
    return {**worst, "cases": cases}


def _users(longest: int, num_events: int) -> Jagged:
    """So many users that they have about `num_events`."""
    like = LongUsers(num_users=4096)
    lengths = torch.from_numpy(like.lengths() * (longest / like.longest)).long()
    lengths = lengths[: max(2, int((lengths.cumsum(0) < num_events).sum()))]
    return Jagged.from_lengths(torch.zeros(int(lengths.sum()), dtype=torch.int64), lengths)


def _draw(users: Jagged, seed: int, *shape: int) -> Tensor:
    """Shapes: -> [T, *shape]."""
    device = users.offsets.device
    drawn = torch.randn(users.values.shape[0], *shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(device, resolve_precision("auto", device))


def _pointwise(users: Jagged, heads: int, dim: int, padded: bool) -> Callable[[], None]:
    device = users.offsets.device
    packed, gradient = _draw(users, 0, heads, 3 * dim).requires_grad_(), _draw(users, 1, heads, dim)
    times_s = torch.randint(10**6, (packed.shape[0],), generator=torch.Generator().manual_seed(0)).to(device)
    weights = [
        torch.zeros(size, device=device, requires_grad=True) for size in (users.max_length, NUM_TIME_BUCKETS)
    ]
    bias = PairBias(by_distance=weights[0], by_time=weights[1])
    pairs = (
        EventPairs.in_cells(users, times_s, padded_layout(users))
        if padded
        else EventPairs.build(users, times_s)
    )

    def run() -> None:
        found = pointwise_attention(packed, dim, pairs, max_length=users.max_length, bias=bias)
        torch.autograd.grad(found, (packed, *weights), gradient)

    return run


def _softmax(users: Jagged, heads: int, dim: int, padded: bool) -> Callable[[], None]:
    inputs, gradient = _draw(users, 0, 3, heads, dim).requires_grad_(), _draw(users, 1, heads, dim)
    layout = replace(padded_layout(users), bounds=None) if padded else bucket_layout(users)

    def run() -> None:
        found = jagged_attention(*inputs.unbind(1), layout)
        torch.autograd.grad(found, inputs, gradient)

    return run


def _peak_mib(run: Callable[[], None]) -> float | None:
    """What a call holds at most beside its inputs; known on an accelerator alone."""
    if not torch.cuda.is_available():
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
