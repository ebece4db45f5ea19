"""Runs a command as a process of its own and watches it and all it starts: time, processor time, memory."""

import resource
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

SAMPLE_EVERY_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Of a command from its start to its end."""

    wall_s: float
    cpu_s: float
    """All processes, as far as they were seen or waited for."""
    peak_bytes: int
    """Largest sum over all processes of what each has to itself (USS)."""
    peak_resident_bytes: int
    """Largest sum of the resident sets; pages that processes share count several times."""


def run_watched(command: Sequence[str], *, environment: dict[str, str]) -> Usage:
    """Raises: RuntimeError with what the command said when it fails."""
    reaped_before = _reaped_cpu_s()
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watcher = _Watcher(process.pid)
    watcher.start()
    said, _ = process.communicate()
    wall_s = time.perf_counter() - started
    watcher.over.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}: {said[-2000:]}")
    return Usage(
        wall_s=wall_s,
        # Short ones end before they are looked at, long ones may outlive the command that started them.
        cpu_s=max(sum(watcher.cpu_s.values()), _reaped_cpu_s() - reaped_before),
        peak_bytes=watcher.peak_bytes,
        peak_resident_bytes=watcher.peak_resident_bytes,
    )


def _reaped_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class _Watcher(threading.Thread):
    """Looks at a process and its descendants at short intervals."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.root = psutil.Process(pid)
        self.over = threading.Event()
        self.cpu_s: dict[int, float] = {}
        self.peak_bytes = self.peak_resident_bytes = 0

    def run(self) -> None:
        while not self.over.is_set():
            with suppress(psutil.Error):
                self._look()
            self.over.wait(SAMPLE_EVERY_S)

    def _look(self) -> None:
        own, resident = 0, 0
        for process in (self.root, *self.root.children(recursive=True)):
            # A process may end between being listed and being looked at.
            with suppress(psutil.Error):
                times, memory = process.cpu_times(), process.memory_full_info()
                self.cpu_s[process.pid] = times.user + times.system
                own, resident = own + memory.uss, resident + memory.rss
        self.peak_bytes = max(self.peak_bytes, own)
        self.peak_resident_bytes = max(self.peak_resident_bytes, resident)
