"""How much memory a piece of work takes."""

import threading
from collections.abc import Callable

import psutil

_SAMPLE_EVERY_S = 0.02


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes by which this process's own memory (without mapped files) grew at most while `run` was running.

    Sampled every 20 ms, so a shorter peak may be missed.
    """
    process, is_over = psutil.Process(), threading.Event()
    before = _own_bytes(process)
    highest = before

    def watch() -> None:
        nonlocal highest
        while not is_over.wait(_SAMPLE_EVERY_S):
            highest = max(highest, _own_bytes(process))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run()
        highest = max(highest, _own_bytes(process))
    finally:
        is_over.set()
        watcher.join()
    return highest - before


def _own_bytes(process: psutil.Process) -> int:
    memory = process.memory_info()
    return memory.rss - memory.shared
