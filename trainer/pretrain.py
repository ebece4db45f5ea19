"""Pretraining: the loop of a worker, from the first or the restored step to the last."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.feed import Feed
from trainer.job import Job, complete_step, end_epoch, finish, make_feed, planned_steps, write_window
from trainer.learner import StepResult
from trainer.operations import counted_step
from trainer.schedule import rate_fraction
from trainer.step_input import StepInput

PROFILED_STEPS = range(10, 15)


def train(job: Job) -> dict[str, Any]:
    """Train until the last epoch, the last step, lost patience or a wish to stop; a collective call.

    Raises: DivergenceError if a loss or gradient is not finite; DataError for damaged shards.
    """
    config, progress = job.config.train, job.progress
    feed = make_feed(job, Feed)
    total_steps = planned_steps(config, job.stream)
    job.reporter.stepped(progress.step)
    while progress.status == "running":
        for step_input, agreement in feed.steps(progress.epoch, progress.position, progress.step):
            fraction = rate_fraction(progress.step, total_steps, config)
            with _profiled(job):
                result = _step(job, step_input, fraction)
            complete_step(
                job, step_input, agreement, result, partial(write_window, job, feed, fraction, total_steps)
            )
            if progress.status != "running":
                break
        else:
            end_epoch(job)
    return finish(job)


def _step(job: Job, step_input: StepInput, fraction: float) -> StepResult:
    """Of the first step that this process takes, the operations are counted too; inside of what is compiled none can
    be seen."""
    config = job.config.train
    rates = config.learning_rate * fraction, config.table_learning_rate * fraction
    if job.operations_per_target is not None or config.compile:
        return job.learner.step(step_input, *rates)
    result, job.operations_per_target = counted_step(
        lambda: job.learner.step(step_input, *rates), job.process
    )
    return result


@contextmanager
def _profiled(job: Job) -> Iterator[None]:
    """Trace a few steps of rank 0 into the run directory where that was asked for."""
    if not (job.config.profile and job.process.rank == 0 and job.progress.step in PROFILED_STEPS):
        yield
        return
    with torch.profiler.profile() as profiler:
        yield
    with tempfile.TemporaryDirectory() as folder:
        # The profiler knows no addresses.
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        job.storage.write(f"profile/step-{job.progress.step:08d}.json", trace.read_bytes())
