"""Building the prefix trie of a catalogue against the nested dicts of published code; time and memory at size."""

import gc
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.nested_trie import build_nested_trie
from benchmarks.setting.benchmark import Bar, Benchmark, Request, compare_times
from benchmarks.setting.memory import peak_memory
from benchmarks.setting.timing import interleave
from cluster.process import Process
from models.decoding.trie import PrefixTrie

BENCHMARK = Benchmark(
    unit="s per build",
    bars=(Bar(key="ratio", at_most=1.0), Bar(key="largest_peak_gb", at_most=1.0)),
    threads_per_rank=2,
)
ROUNDS = {"full": 3, "small": 1}
ITEMS = {"full": 1_000_000, "small": 2_000}
SIZES = {"full": (1_000_000, 10_000_000), "small": (2_000, 20_000)}
CODES = 256


def measure(process: Process, request: Request) -> dict[str, Any]:
    """One round builds the trie of random paths of 3 codes; larger catalogues are built by our side alone."""
    codes = _codes(ITEMS[request.scale], 3)
    sides = {
        "ours": lambda: PrefixTrie.build(codes, (CODES,) * 3),
        "peer": lambda: build_nested_trie(codes.tolist()),
    }
    timings = interleave(process, sides, rounds=ROUNDS[request.scale])
    largest = [_at_size(num_items, levels) for num_items in SIZES[request.scale] for levels in (3, 4)]
    return {
        **compare_times(timings["ours"], timings["peer"]),
        "largest_peak_gb": max(build["peak_gb"] for build in largest),
        "builds": largest,
    }


def _codes(num_items: int, levels: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(CODES, (num_items, levels), generator=generator, dtype=torch.int32)


def _at_size(num_items: int, levels: int) -> dict[str, Any]:
    """Seconds and memory of one build, beside the codes it is built from."""
    codes, built = _codes(num_items, levels), []
    gc.collect()
    started = time.perf_counter()
    peak_bytes = peak_memory(lambda: built.append(PrefixTrie.build(codes, (CODES,) * levels)))
    return {
        "items": num_items,
        "levels": levels,
        "seconds": time.perf_counter() - started,
        "peak_gb": peak_bytes / 1e9,
        "kept_gb": built[0].memory_bytes() / 1e9,
    }
