"""What there is to compute on: this machine, and the hosts of the Ray cluster it has joined."""

import os
from pathlib import Path

import psutil


def usable_cores() -> int:
    """Cores this process may use, after affinity and container limits."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, period = quota.read_text().split()
        if allowed != "max":
            return max(1, min(affinity, round(int(allowed) / int(period))))
    return affinity


def usable_memory_bytes() -> int:
    """Memory the processes of this machine may use together, after container limits."""
    there, limit = psutil.virtual_memory().total, Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    return there if allowed == "max" else min(there, int(allowed))


def num_hosts() -> int:
    """Hosts that are alive in the Ray cluster this process has joined."""
    import ray  # only where a cluster has been joined

    return sum(node["Alive"] for node in ray.nodes())
