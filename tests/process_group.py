"""Runs a function on real processes of one group, for tests of what only shows between processes."""

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.process import Process, start_process, stop_process

# A fork server imports what is slow once, not once per process of every test.
_PRELOADED = ["trainer.start", "sharding.apply", "trainer.dense_engine", "tests.training_cases"]

ALONE = Process(
    rank=0,
    world_size=1,
    local_rank=0,
    local_world_size=1,
    device=torch.device("cpu"),
    host_group=None,
    num_threads=1,
)
"""A process in no group."""


def run_on_processes(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = 120
) -> list[Any]:
    """Call `function(process, *arguments)` on every rank and return the results in the order of the ranks.

    The function must stand at the top level of its module. Raises RuntimeError with the traceback of the rank
    that failed first, and TimeoutError where the ranks do not end in time; none is left running.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(
                target=_run_rank, args=(rank, world_size, directory, timeout_s, function, arguments)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(directory), timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [torch.load(Path(directory) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def impatient(process: Process, timeout_s: float) -> Process:
    """The same process, for whose host group a wait of so many seconds is too long; a collective call."""
    host_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
    return replace(process, host_group=host_group)


def _wait(processes: list, directory: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    running = dict(enumerate(processes))
    while running:
        sentinels = [process.sentinel for process in running.values()]
        if not connection.wait(sentinels, timeout=max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"ranks {sorted(running)} did not end within {timeout_s} s")
        for rank, process in list(running.items()):
            if process.exitcode is None:
                continue
            if process.exitcode != 0:
                raise RuntimeError(
                    f"rank {rank} ended with {process.exitcode}\n{_first_traceback(directory)}"
                )
            del running[rank]


def _first_traceback(directory: Path) -> str:
    tracebacks = sorted(directory.glob("*.traceback"), key=lambda path: path.stat().st_mtime_ns)
    return tracebacks[0].read_text() if tracebacks else "(no traceback: the process was killed)"


def _run_rank(
    rank: int, world_size: int, directory: str, timeout_s: float, function: Callable, arguments: tuple
) -> None:
    try:
        process: Process = start_process(
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            local_world_size=world_size,
            rendezvous=f"file://{directory}/rendezvous",
            num_threads=1,
            timeout_s=timeout_s,
        )
        torch.save(function(process, *arguments), Path(directory) / f"{rank}.pt")
        stop_process()
    except BaseException:
        temporary = Path(directory) / f"{rank}.traceback"
        temporary.write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
