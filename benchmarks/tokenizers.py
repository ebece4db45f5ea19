"""Semantic IDs out of core: residual k-means and the other tokenizers against plain faiss residual quantisation."""

import gc
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from benchmarks.peers.faiss_quantiser import FaissQuantiser
from benchmarks.setting.benchmark import Bar, Benchmark, Request, compare_times
from benchmarks.setting.memory import peak_memory
from benchmarks.setting.timing import interleave
from cluster.process import Process
from models.tokenizers.balanced_kmeans import BalancedKMeans
from models.tokenizers.finite_scalar import FiniteScalar
from models.tokenizers.random_codes import RandomCodes
from models.tokenizers.residual_kmeans import ResidualKMeans
from models.tokenizers.rq_vae import RqVae
from models.tokenizers.tokenizer import Matrix, Tokenizer, reconstruction_error

BENCHMARK = Benchmark(
    unit="s per catalogue",
    bars=(
        Bar(key="ratio", at_most=1.0),
        Bar(key="error_ratio", at_most=1.05),
        Bar(key="memory_mb", at_most=512.0),
    ),
    threads_per_rank=2,
)
ROUNDS = {"full": 2, "small": 1}
NUM_ITEMS = {"full": 1_000_000, "small": 2_000}
WIDTH = 64
LEVELS = 3
CODES_BITS = {"full": 8, "small": 4}
STEPS = {"full": 2_000, "small": 5}
_BLOCK_ROWS = 50_000


def measure(process: Process, request: Request) -> dict[str, Any]:
    """One round learns codes from a matrix on disk and gives one to every item; both start with nothing."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    vectors = _write_vectors(Path(request.scratch) / "vectors.npy", NUM_ITEMS[request.scale])
    bits = CODES_BITS[request.scale]
    sizes = (2**bits,) * LEVELS
    found: dict[str, Any] = {}

    def run_ours() -> None:
        found["ours"] = _tokenize(ResidualKMeans.Config(code_sizes=sizes).build(dim=WIDTH), vectors)

    def run_peer() -> None:
        found["peer"] = FaissQuantiser(WIDTH, LEVELS, bits).tokenize(vectors)

    # Before the timed rounds: memory that a library keeps for the next time would not show any more.
    memory_mb, peer_memory_mb = _memory_mb(run_ours, found), _memory_mb(run_peer, found)
    timings = interleave(process, {"ours": run_ours, "peer": run_peer}, rounds=ROUNDS[request.scale])
    tokenizer, codes = found["ours"]
    quantiser, peer_codes = found["peer"]
    error = reconstruction_error(tokenizer.decode, vectors, codes)
    peer_error = reconstruction_error(quantiser.decode, vectors, peer_codes)
    found.clear()
    return {
        **compare_times(timings["ours"], timings["peer"]),
        "items": len(vectors),
        "code_sizes": sizes,
        "error": error,
        "peer_error": peer_error,
        "error_ratio": error / peer_error,
        "memory_mb": memory_mb,
        "peer_memory_mb": peer_memory_mb,
        "others": _others(vectors, sizes, STEPS[request.scale]),
    }


def _write_vectors(path: Path, num_items: int) -> np.ndarray:
    """Points around a tree of centres, three deep, so that there is something to be found at every level."""
    random = np.random.default_rng(0)
    centres = [scale * random.standard_normal((200, WIDTH), dtype=np.float32) for scale in (1.0, 0.6, 0.4)]
    matrix = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num_items, WIDTH))
    for start in range(0, num_items, _BLOCK_ROWS):
        count = min(_BLOCK_ROWS, num_items - start)
        block = 0.3 * random.standard_normal((count, WIDTH), dtype=np.float32)
        for level in centres:
            block += level[random.integers(0, len(level), count)]
        matrix[start : start + count] = block
    matrix.flush()
    del matrix
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _tokenize(tokenizer: Tokenizer, vectors: Matrix) -> tuple[Tokenizer, np.ndarray]:
    tokenizer.fit(vectors)
    return tokenizer, tokenizer.assign(vectors)


def _memory_mb(run: Any, found: dict[str, Any]) -> float:
    gc.collect()
    grown = peak_memory(run)
    found.clear()
    return grown / 2**20


def _others(vectors: np.ndarray, sizes: tuple[int, ...], steps: int) -> dict[str, dict[str, float]]:
    """Seconds, memory and error of each further tokenizer, once."""
    configs = {
        "balanced-kmeans": BalancedKMeans.Config(code_sizes=sizes),
        "rq-vae": RqVae.Config(code_sizes=sizes, steps=steps),
        "finite-scalar": FiniteScalar.Config(steps=steps),
        "random-codes": RandomCodes.Config(code_sizes=sizes),
    }
    results = {}
    for name, config in configs.items():
        found: list[Any] = []
        started = time.perf_counter()
        grown = peak_memory(
            lambda config=config, found=found: found.extend(_tokenize(config.build(dim=WIDTH), vectors))
        )
        seconds = time.perf_counter() - started
        results[name] = {
            "seconds": seconds,
            "memory_mb": grown / 2**20,
            "error": reconstruction_error(found[0].decode, vectors, found[1]),
        }
    return results
