"""What the workers of an elastic gang do in tests: they count steps together, and save their count now and then."""

import time
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.process import Process
from cluster.reporter import Reporter

SAVED_EVERY = 5


def count_steps(process: Process, path: str, last: int, reporter: Reporter) -> tuple[int, int]:
    """(steps counted, number of workers at the end); goes on from the count in the file `path`."""
    saved = Path(path)
    step = int(saved.read_text()) if saved.exists() else 0
    while step < last:
        stop = torch.tensor([int(reporter.stop_requested())])
        dist.all_reduce(stop, op=dist.ReduceOp.MAX)
        step += 1
        reporter.stepped(step)
        if process.rank == 0 and (step % SAVED_EVERY == 0 or stop.item()):
            saved.write_text(str(step))
        if step % SAVED_EVERY == 0:
            reporter.saved(step)
        if stop.item():
            break
        time.sleep(0.05)
    return step, process.world_size
