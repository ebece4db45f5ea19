"""What every training loop works with on one rank, and does between its steps: validate, save, end."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import NobodyHeldOutError
from cluster.memory import FreedMemory
from cluster.process import Process
from cluster.reporter import Reporter
from cluster.storage import Storage
from data_streams.stream import TrainStream
from models.recommender import Ranker
from trainer.assembly import Assembly
from trainer.audit import AuditLog
from trainer.checkpoint import Checkpointer
from trainer.configuration import PretrainConfig, TrainConfig
from trainer.evaluate import validation_metrics
from trainer.feed import Agreement, Feed
from trainer.learner import Learner, StepResult
from trainer.metric_log import MetricLog
from trainer.peak_rates import utilisation
from trainer.ranking import answer_metrics
from trainer.run_state import Progress, save_progress
from trainer.step_input import StepInput
from trainer.weight_average import averaged

logger = logging.getLogger(__name__)

FeedKind = TypeVar("FeedKind", bound=Feed)
LAST_STEP = "step"
"""A selection metric by which every step is better than those before."""


@dataclass(kw_only=True)
class Job:
    """Everything the loop works with on one rank; put together by `trainer.start`."""

    config: PretrainConfig
    config_document: dict[str, Any]
    process: Process
    reporter: Reporter
    storage: Storage
    assembly: Assembly
    stream: TrainStream
    learner: Learner
    engine: Any
    checkpointer: Checkpointer
    audit: AuditLog
    metric_log: MetricLog | None
    """On rank 0 only."""
    progress: Progress
    clock: "CheckpointClock"
    window: "Window" = field(default_factory=lambda: Window())
    freed_memory: FreedMemory = field(default_factory=FreedMemory)
    after_validation: Callable[[Mapping[str, float]], None] = lambda metrics: None
    """What else the loop makes of the metrics of a validation."""
    operations_per_target: float | None = None
    """Floating-point operations of training per supervised target, where they were counted."""
    write_rest: Callable[[], None] = lambda: None
    """Writes the numbers of the steps since the last line, as the last step would have."""

    def __post_init__(self) -> None:
        self.saved_place = self.progress.place
        """Of the last checkpoint."""


def make_feed(job: Job, kind: type[FeedKind]) -> FeedKind:
    """Where the steps of a run come from."""
    return kind(
        job.stream,
        job.assembly.model,
        job.assembly.item_features,
        job.process,
        seed=job.config.seed,
        micro_batches=job.config.train.micro_batches,
        prefetch_steps=job.config.data.prefetch_steps,
        stop_requested=job.reporter.stop_requested,
        checkpoint_after=job.clock.due_after,
    )


def planned_steps(config: TrainConfig, stream: TrainStream) -> int:
    """Steps the learning-rate schedule is laid out for."""
    steps = config.epochs * stream.steps_per_epoch()
    return steps if config.max_steps is None else min(steps, config.max_steps)


def complete_step(
    job: Job, step_input: StepInput, agreement: Agreement, result: StepResult, write: Callable[[], None]
) -> None:
    """Account for an optimizer step that was taken: audit, position, log, validation, checkpoint; collective."""
    config, progress = job.config.train, job.progress
    job.audit.record(progress.step, progress.epoch, step_input.user_ids.tolist())
    progress.step += 1
    progress.position = step_input.position
    job.reporter.stepped(progress.step)
    job.window.add(result)
    job.write_rest = write
    if progress.step % job.config.log.every_steps == 0:
        write()
        job.freed_memory.give_back_excess()
    if config.max_steps is not None and progress.step >= config.max_steps:
        progress.status = "finished"
    improved = _improved(job) if _validation_due(config, progress) else False
    if agreement.stop and progress.status == "running":
        progress.status = "stopped"
    # Agreed on steps ahead, in which another may have been saved.
    due_by_time = agreement.checkpoint_after == job.clock.last_step
    if improved or due_by_time or _checkpoint_due(config, progress):
        save(job, best=improved)


def end_epoch(job: Job) -> None:
    config, progress = job.config.train, job.progress
    if progress.epoch + 1 == config.epochs:
        # While it is the epoch of these steps.
        _end_window(job)
    progress.epoch += 1
    progress.position = None
    if progress.epoch >= config.epochs:
        progress.status = "finished"
    due = progress.status == "finished" or progress.epoch % config.validate_every_epochs == 0
    if config.validate_every_steps is None and due and _improved(job):
        save(job, best=True)


def _end_window(job: Job) -> None:
    """Or a run of fewer steps than a line takes would tell of none."""
    if job.window.steps:
        job.write_rest()


def _validation_due(config: TrainConfig, progress: Progress) -> bool:
    if config.validate_every_steps is not None:
        return progress.step % config.validate_every_steps == 0
    return progress.status == "finished" and progress.epoch < config.epochs


def _checkpoint_due(config: TrainConfig, progress: Progress) -> bool:
    every = config.checkpoint_every_steps
    return every is not None and progress.step % every == 0


def _improved(job: Job) -> bool:
    """Whether this step is the best so far, which the last one is where nobody is held out for validation."""
    try:
        return validate(job)
    except NobodyHeldOutError as error:
        logger.warning(
            "No validation at step %d, which counts as the best so far: %s", job.progress.step, error
        )
        return True


def validate(job: Job) -> bool:
    """Rank the validation items and keep account of the best step -> whether this is the best so far.

    Raises: NobodyHeldOutError, on every rank, where there are none.
    """
    config, progress = job.config.train, job.progress
    started = time.perf_counter()
    job.reporter.pause_steps()
    with averaged(job.engine):
        metrics = _validation_metrics(job)
    # Where the loss of a model says nothing of how well it finds items, the last step is the best one.
    by_step = config.selection_metric == LAST_STEP
    value = progress.step if by_step else metrics[config.selection_metric]
    improved = progress.best is None or value > progress.best
    if improved:
        progress.best, progress.best_step, progress.validations_without_gain = value, progress.step, 0
    else:
        progress.validations_without_gain += 1
    if config.patience is not None and progress.validations_without_gain > config.patience:
        progress.status = "finished"
    logger.info(
        "Step %d, after %d whole epochs: validation %s %.4f%s (%.1f s)",
        progress.step,
        progress.epoch,
        config.selection_metric,
        value,
        ", the best so far" if improved else "",
        time.perf_counter() - started,
    )
    if job.metric_log:
        job.metric_log.write(
            progress.step, {f"validation/{name}": number for name, number in metrics.items()}
        )
    job.after_validation(metrics)
    return improved


def _validation_metrics(job: Job) -> dict[str, float]:
    assembly = job.assembly
    if isinstance(assembly.model, Ranker):
        return answer_metrics(assembly, job.config.data)
    users = assembly.users("valid")
    return validation_metrics(
        assembly.search(job.learner.module.precision, width=job.config.search.validation_width),
        users.batches(),
        empty_batch=users.empty_batch(),
        config=job.config.evaluation,
    )


def save(job: Job, *, best: bool) -> None:
    job.audit.flush()
    if job.metric_log:
        job.metric_log.flush()
        job.progress.metric_lines = job.metric_log.num_lines
    started = time.perf_counter()
    save_progress(job.checkpointer, job.assembly, job.engine, job.progress, job.config_document, best=best)
    job.clock.saved(job.progress.step)
    job.saved_place = job.progress.place
    if job.metric_log:
        held = time.perf_counter() - started
        job.metric_log.write(job.progress.step, {"checkpoint/held_s": held})


def finish(job: Job) -> dict[str, Any]:
    progress = job.progress
    if progress.status != "stopped":
        # One that goes on has lines where others do.
        _end_window(job)
    job.reporter.pause_steps()
    if job.saved_place != progress.place:
        save(job, best=False)
    job.checkpointer.close()
    # Rank 0 has committed the last checkpoint once it arrives here.
    dist.barrier(group=job.process.host_group)
    if job.metric_log:
        job.metric_log.close()
    return {
        "status": progress.status,
        "step": progress.step,
        "epoch": progress.epoch,
        "best": progress.best,
        "best_step": progress.best_step,
    }


class CheckpointClock:
    """Says on rank 0 when the next checkpoint is due by time; all ranks know the step of the last one."""

    def __init__(self, every_s: float | None, step: int):
        self.every_s = every_s
        self.last_step = step
        self.last_time = time.monotonic()

    def due_after(self) -> int | None:
        """The step of the last checkpoint where the next one is due, else None."""
        is_due = self.every_s is not None and time.monotonic() - self.last_time >= self.every_s
        return self.last_step if is_due else None

    def saved(self, step: int) -> None:
        self.last_step, self.last_time = step, time.monotonic()


class Window:
    """Sums over the steps since the last log line."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.targets = self.steps = 0
        self.started = time.perf_counter()
        self.wait_s = 0.0

    def add(self, result: StepResult) -> None:
        for name, value in {"loss": result.loss_sum, **result.metrics}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.targets += result.global_count
        self.steps += 1

    def close(self, process: Process, wait_s: float) -> dict[str, float]:
        """Means over all ranks, and rates; a collective call."""
        totals = torch.cat([value.flatten() for value in self.sums.values()]).float()
        if process.world_size > 1:
            dist.all_reduce(totals)
        seconds = time.perf_counter() - self.started
        means = {
            f"train/{name}": total / max(self.targets, 1)
            for name, total in zip(_element_names(self.sums), totals.tolist(), strict=True)
        }
        return means | {
            "train/targets_per_s": self.targets / seconds,
            "train/step_s": seconds / self.steps,
            "train/targets_per_step": self.targets / self.steps,
            "data/wait_share": (wait_s - self.wait_s) / seconds,
        }

    def restart(self, wait_s: float) -> None:
        self.__init__()
        self.wait_s = wait_s


def _element_names(sums: Mapping[str, Tensor]) -> Iterator[str]:
    """A vector's elements are reported as NAME/0, NAME/1 and so on."""
    for name, value in sums.items():
        yield from [f"{name}/{index}" for index in range(len(value))] if value.dim() else [name]


def _rates(targets_per_s: float, operations_per_target: float, process: Process) -> dict[str, float]:
    operations_per_s = targets_per_s * operations_per_target
    rates = {
        "train/gigaflops_per_target": operations_per_target / 1e9,
        "train/gigaflops_per_s": operations_per_s / 1e9,
    }
    share = utilisation(operations_per_s, process.device, process.world_size)
    return rates if share is None else rates | {"train/hfu": share}


def write_window(
    job: Job, feed: Feed, fraction: float, total_steps: int, further: Mapping[str, float] | None = None
) -> None:
    """A line of numbers of the steps since the last one; a collective call. `further` ones are rank 0's own."""
    config, progress = job.config.train, job.progress
    numbers = job.window.close(job.process, feed.wait_s)
    job.window.restart(feed.wait_s)
    if job.metric_log is None:
        return
    numbers |= {
        "train/epoch": progress.epoch,
        "train/learning_rate": config.learning_rate * fraction,
        "train/table_learning_rate": config.table_learning_rate * fraction,
        **(further or {}),
    }
    if job.operations_per_target is not None:
        numbers |= _rates(numbers["train/targets_per_s"], job.operations_per_target, job.process)
    job.metric_log.write(progress.step, numbers)
    job.reporter.progress(
        step=progress.step,
        total_steps=total_steps,
        epoch=progress.epoch + 1,
        epochs=config.epochs,
        loss=numbers["train/loss"],
        tokens_per_s=numbers["train/targets_per_s"],
        step_s=numbers["train/step_s"],
    )
