"""What there is to compute on: this machine, and the hosts of the Ray cluster it has joined."""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, kw_only=True)
class Machine:
    cores: int
    """Cores this process may use, after affinity and container limits."""
    memory_bytes: int
    """Memory this process may use, after container limits."""
    gpus: int


def this_machine() -> Machine:
    import torch  # takes seconds, and only the count of accelerators needs it

    return Machine(cores=usable_cores(), memory_bytes=_memory_bytes(), gpus=torch.cuda.device_count())


def usable_cores() -> int:
    """Cores this process may use, after affinity and container limits."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, period = quota.read_text().split()
        if allowed != "max":
            return max(1, min(affinity, round(int(allowed) / int(period))))
    return affinity


def num_hosts() -> int:
    """Hosts that are alive in the Ray cluster this process has joined."""
    import ray  # only where a cluster has been joined

    return sum(node["Alive"] for node in ray.nodes())


def _memory_bytes() -> int:
    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        return min(total, int(text))
    return total
