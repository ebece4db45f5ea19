"""What a benchmark is: one file of this package with a `BENCHMARK` and a `measure`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.setting.timing import Timing

Scale = Literal["full", "small", "accelerator"]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A limit for one number of a result."""

    key: str
    at_least: float | None = None
    at_most: float | None = None

    def is_met(self, result: Mapping[str, Any]) -> bool:
        value = result[self.key]
        too_low = self.at_least is not None and value < self.at_least
        return not (too_low or (self.at_most is not None and value > self.at_most))

    def __str__(self) -> str:
        return (
            f"{self.key} >= {self.at_least:g}" if self.at_most is None else f"{self.key} <= {self.at_most:g}"
        )


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Where a comparison runs and what is asked of it."""

    unit: str
    bars: tuple[Bar, ...]
    world_size: int = 1
    threads_per_rank: int
    on_accelerator: bool = False
    """Whether it has sizes for an accelerator, where a single process measures."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `measure(process, request)` gets on every rank; it returns the numbers of the result."""

    scale: Scale
    data: str
    """Folder of shards in the form of `grail data build`."""
    scratch: str
    """Folder for files of the benchmark, deleted at its end."""


def compare_rates(amount: int, ours: Timing, peer: Timing) -> dict[str, Any]:
    """Both sides did the same amount of work in each round; the ratio is above 1 where ours is faster."""
    return _result(amount / ours.best_s, amount / peer.best_s, ours, peer)


def compare_times(ours: Timing, peer: Timing) -> dict[str, Any]:
    """Seconds of the quickest rounds; the ratio is below 1 where ours is faster."""
    return _result(ours.best_s, peer.best_s, ours, peer)


def _result(ours: float, peer: float, our_timing: Timing, peer_timing: Timing) -> dict[str, Any]:
    return {
        "ours": ours,
        "peer": peer,
        "ratio": ours / peer,
        "cpu_seconds": {"ours": our_timing.cpu_of_best_s, "peer": peer_timing.cpu_of_best_s},
        "rounds_s": {"ours": our_timing.wall_s, "peer": peer_timing.wall_s},
    }
