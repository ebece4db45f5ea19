"""Runs a measurement on processes of its own, so that no benchmark sees the threads or memory of another."""

import json
import logging
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessContext

from cluster.process import start_process, stop_process


def measure_on_ranks(
    measure: Callable[..., dict[str, Any]],
    world_size: int,
    threads_per_rank: int,
    *arguments: Any,
    timeout_s: float,
    use_gpu: bool = False,
) -> dict[str, Any]:
    """What `measure(process, *arguments)` returns on rank 0, which must be plain JSON values.

    Raises: ProcessRaisedException with the traceback of the rank that failed; TimeoutError.
    """
    # The fork server imports the slow libraries once, not once per benchmark.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "torchrec", "deepspeed"])
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.start_processes(
            _run_rank,
            args=(world_size, threads_per_rank, folder, timeout_s, use_gpu, measure, arguments),
            nprocs=world_size,
            join=False,
            start_method="forkserver",
        )
        try:
            _wait(context, timeout_s)
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return json.loads((Path(folder) / "result.json").read_text())


def _wait(context: ProcessContext, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not context.join(timeout=max(deadline - time.monotonic(), 0.0)):
        if time.monotonic() >= deadline:
            raise TimeoutError(
                f"a benchmark must end within {timeout_s:.0f} s; this one did not and was ended"
            )


def _run_rank(
    rank: int,
    world_size: int,
    threads_per_rank: int,
    folder: str,
    timeout_s: float,
    use_gpu: bool,
    measure: Callable,
    arguments: tuple,
) -> None:
    # What libraries tell at their start would bury the results.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    process = start_process(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        rendezvous=f"file://{folder}/rendezvous",
        num_threads=threads_per_rank,
        use_gpu=use_gpu,
        timeout_s=timeout_s,
    )
    result = measure(process, *arguments)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    stop_process()
