"""A layer of experts against that of DeepSpeed and against a dense layer of equal FLOPs, forward and backward."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.peers.deepspeed_experts import SETTINGS, DeepSpeedExperts
from benchmarks.setting.benchmark import Bar, Benchmark, Request, compare_rates
from benchmarks.setting.timing import Timing, interleave
from benchmarks.setting.wire import CountedExchange
from cluster.process import Process
from models.layers.feedforward import FeedForward
from models.layers.moe import Mixture, MixtureConfig
from sharding.experts import shard_experts, start_deepspeed
from trainer.dense_module import resolve_precision
from trainer.expert_balance import forget_routings

BENCHMARK = Benchmark(
    unit="tokens/s",
    bars=(
        Bar(key="ratio", at_least=1.5),
        Bar(key="slower_than_dense", at_most=1.2),
        Bar(key="bytes_over_minimum", at_most=1.01),
    ),
    world_size=2,
    threads_per_rank=1,
)
SIZES = (1, 2)
WIDTH, HIDDEN, NUM_EXPERTS = 256, 1024, 8
TOKENS = {"full": (2048, 16384), "small": (64,)}
"""Of both ranks together."""
ROUNDS = {"full": 4, "small": 1}
BATCHES = 3
"""Per round, so that every group of tokens has another size each time."""
DTYPES = (torch.float32, torch.bfloat16)


def measure(process: Process, request: Request) -> dict[str, Any]:
    """The headline is the case in which we gain least over DeepSpeed; `cases` has all of them."""
    start_deepspeed()
    torch.manual_seed(0)
    cases = {
        f"{tokens} tokens, top-{top_k}": _case(process, tokens, top_k, ROUNDS[request.scale])
        for tokens, top_k in product(TOKENS[request.scale], (1, 2))
    }
    every = {f"{name}, ep {size}": case[size] for name, case in cases.items() for size in SIZES}
    worst = min(every.values(), key=lambda case: case["ratio"])
    return {
        **{key: worst[key] for key in ("ours", "peer", "ratio", "cpu_seconds", "rounds_s")},
        "slower_than_dense": max(case["slower_than_dense"] for case in every.values()),
        "bytes_over_minimum": max(case["bytes_over_minimum"] for case in every.values()),
        "our_precision": _name(resolve_precision("auto", process.device)),
        "cases": every,
    }


def _case(process: Process, tokens: int, top_k: int, rounds: int) -> dict[int, dict[str, Any]]:
    generator = torch.Generator().manual_seed(process.rank)
    own = tokens // process.world_size
    batches = [torch.randn(own, WIDTH, generator=generator) for _ in range(BATCHES)]
    precision = resolve_precision("auto", process.device)
    layers = {size: _our_layer(top_k, size, process) for size in SIZES}
    sides = {f"ours {size}": _passes(layer, batches, precision) for size, layer in layers.items()}
    dense = FeedForward(WIDTH, HIDDEN * top_k)
    for dtype in DTYPES:
        sides[f"dense {_name(dtype)}"] = _passes(dense, batches, dtype)
        for size, setting in product(SIZES, SETTINGS):
            peer = _peer_layer(setting, top_k, size)
            sides[f"{setting} {size} {_name(dtype)}"] = _passes(peer, batches, dtype)
    timings = interleave(process, sides, rounds=rounds)
    return {
        size: {
            **_compare(timings, size, tokens * BATCHES),
            **_bytes(layer, batches, precision),
            "pass_ms": {name: timing.best_s / BATCHES * 1e3 for name, timing in timings.items()},
        }
        for size, layer in layers.items()
    }


def _compare(timings: Mapping[str, Timing], size: int, tokens: int) -> dict[str, Any]:
    """Against the quicker precision of each other side."""
    ours, dense = timings[f"ours {size}"], _quickest(timings, "dense")
    peers = {setting: _quickest(timings, f"{setting} {size}") for setting in SETTINGS}
    return {
        **compare_rates(tokens, ours, peers["dropless"]),
        "ratio_to_setting": {setting: peer.best_s / ours.best_s for setting, peer in peers.items()},
        "slower_than_dense": ours.best_s / dense.best_s,
        "peer_slower_than_dense": {setting: peer.best_s / dense.best_s for setting, peer in peers.items()},
    }


def _our_layer(top_k: int, size: int, process: Process) -> Mixture:
    layer = MixtureConfig(num_experts=NUM_EXPERTS, top_k=top_k, hidden=HIDDEN).build(WIDTH)
    # Alike in distribution to what DeepSpeed's gate begins with.
    nn.init.kaiming_uniform_(layer.router.weight, a=5**0.5)
    shard_experts(layer, size, process)
    return layer


def _peer_layer(setting: str, top_k: int, size: int) -> DeepSpeedExperts:
    return DeepSpeedExperts(
        setting, width=WIDTH, hidden=HIDDEN, num_experts=NUM_EXPERTS, top_k=top_k, size=size
    )


def _passes(layer: nn.Module, batches: Sequence[Tensor], dtype: torch.dtype) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            _pass(layer, batch, dtype)

    return run


def _pass(layer: nn.Module, batch: Tensor, dtype: torch.dtype) -> None:
    hidden = batch.clone().requires_grad_()
    if isinstance(layer, Mixture):
        forget_routings([layer])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = layer(hidden)
    output.float().square().sum().backward()
    layer.zero_grad()


def _bytes(layer: Mixture, batches: Sequence[Tensor], dtype: torch.dtype) -> dict[str, float]:
    """What this rank sends in one pass, against one row per chosen expert elsewhere, four times."""
    with CountedExchange() as exchange:
        _pass(layer, batches[0], dtype)
    parts = layer.experts.num_parts
    _, chosen = layer._route(batches[0], None)
    place = chosen // (NUM_EXPERTS // parts)
    elsewhere = int((place != dist.get_rank() % parts).sum())
    received = exchange.received_rows
    minimum = 2 * (elsewhere + received) * WIDTH * dtype.itemsize
    return {
        "sent_bytes": exchange.sent_bytes,
        "minimum_bytes": minimum,
        "bytes_over_minimum": exchange.sent_bytes / minimum if minimum else 1.0,
    }


def _quickest(timings: Mapping[str, Timing], side: str) -> Timing:
    return min((timings[f"{side} {_name(dtype)}"] for dtype in DTYPES), key=lambda timing: timing.best_s)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
