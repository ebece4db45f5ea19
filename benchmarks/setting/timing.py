"""Timing several ways of doing the same work under the same conditions."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from cluster.process import Process


@dataclass(kw_only=True)
class Timing:
    """Rounds of one side on one rank."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """All threads of all ranks."""

    @property
    def best_s(self) -> float:
        return min(self.wall_s)

    @property
    def cpu_of_best_s(self) -> float:
        """Processor time of the quickest round."""
        return self.cpu_s[self.wall_s.index(self.best_s)]


def interleave(
    process: Process,
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    settle: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Run the sides in turn, A B A B ..., after one warm-up of each; a collective call. An accelerator is waited for.

    `settle` runs before each timed call and is not timed.
    """
    timings = {name: Timing() for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            if settle is not None:
                settle()
            dist.barrier(group=process.host_group)
            started, cpu_started = time.perf_counter(), time.process_time()
            run()
            if process.device.type == "cuda":
                torch.cuda.synchronize()
            wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
            if number > 0:
                timings[name].wall_s.append(wall_s)
                timings[name].cpu_s.append(_sum_over_ranks(cpu_s, process))
    return timings


def _sum_over_ranks(value: float, process: Process) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total, group=process.host_group)
    return total.item()
