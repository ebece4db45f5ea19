"""Building: `grail data build` against plain polars in memory, and the memory of all processes of the build."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.setting.benchmark import Bar, Benchmark, Request, compare_rates
from benchmarks.setting.process_tree import Usage, run_watched
from benchmarks.setting.timing import Timing
from cluster.packages import root
from cluster.process import Process
from cluster.storage import Storage
from data_streams.manifest import Manifest

BENCHMARK = Benchmark(
    unit="events/s",
    bars=(Bar(key="peak_memory_gib", at_most=4.0),),
    threads_per_rank=2,
)
GIB = 2**30
SEED = 0
EVENTS_PER_USER = 40
FIRST_SECOND = 1_600_000_000


@dataclass(frozen=True, kw_only=True)
class Log:
    """Size of a made-up log."""

    num_events: int
    num_items: int
    events_per_file: int


LOGS = {
    "full": Log(num_events=20_000_000, num_items=1_000_000, events_per_file=1_000_000),
    "small": Log(num_events=20_000, num_items=500, events_per_file=5_000),
}


def measure(process: Process, request: Request) -> dict[str, Any]:
    """Both sides read the same Parquet files and are commands of their own; one round each."""
    log, scratch = LOGS[request.scale], Path(request.scratch)
    pattern = write_log(scratch / "log", log)
    ours = run_watched(_build_command(pattern, scratch / "shards"), environment=_environment())
    _require_all(scratch / "shards", log)
    peer = run_watched(_peer_command(pattern, scratch / "users.parquet"), environment=_environment())
    return {
        **compare_rates(log.num_events, _timing(ours), _timing(peer)),
        "events": log.num_events,
        "peak_memory_gib": ours.peak_bytes / GIB,
        "peak_resident_gib": ours.peak_resident_bytes / GIB,
        "peer_peak_memory_gib": peer.peak_bytes / GIB,
    }


def write_log(folder: Path, log: Log) -> str:
    """Events in the order of time over Parquet files -> the pattern that finds them.

    Users and items are drawn independently, items by p(rank) ~ (rank + 10) ** -0.9, users by p ~ rank ** (-1 / 3).
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(SEED)
    num_users = max(log.num_events // EVENTS_PER_USER, 1)
    popularity = np.cumsum((np.arange(log.num_items) + 10.0) ** -0.9)
    for number, start in enumerate(range(0, log.num_events, log.events_per_file)):
        size = min(log.events_per_file, log.num_events - start)
        items = np.searchsorted(popularity, random.random(size) * popularity[-1])
        events = pl.DataFrame(
            {
                "user_id": (num_users * random.random(size) ** 1.5).astype(np.int64),
                "item_id": items.astype(np.int64),
                "timestamp_s": FIRST_SECOND + start + np.arange(size),
                "action": pl.Series(random.integers(0, 4, size) > 0).replace_strict(
                    {True: "click", False: "like"}
                ),
            }
        )
        events.write_parquet(folder / f"{number:05d}.parquet")
    return str(folder / "*.parquet")


def _build_command(pattern: str, out: Path) -> list[str]:
    command = [sys.executable, "-m", "launch.cli", "data", "build", "events", "--events", pattern]
    return [*command, "--out", str(out), "--split", "leave-last-out"]


def _peer_command(pattern: str, out: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.peers.polars_sort", pattern, str(out)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root()), "POLARS_MAX_THREADS": str(BENCHMARK.threads_per_rank)}


def _require_all(shards: Path, log: Log) -> None:
    built = Manifest.load(Storage(shards)).num_events
    if built != log.num_events:
        raise AssertionError(f"a build must keep {log.num_events} events and has kept {built}")


def _timing(usage: Usage) -> Timing:
    return Timing(wall_s=[usage.wall_s], cpu_s=[usage.cpu_s])
