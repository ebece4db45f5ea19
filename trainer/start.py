"""From a configuration to a job ready to train: built, placed, restored or initialised from another run."""

import io
import logging
import secrets
from collections.abc import Callable
from typing import Any

import polars as pl
import torch

from cluster.errors import CheckpointError, PlanError
from cluster.process import Process
from cluster.reporter import Reporter
from cluster.storage import Storage
from data_streams.item_table import ITEMS_NAME
from data_streams.stream import TrainStream
from models.generator import Generator
from models.recommender import Ranker, Recommender
from sharding.placements import render_plan
from trainer.assembly import Assembly, agree_on, assemble
from trainer.audit import AuditLog, next_attempt
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_fallback import newest_step, restore_newest, void_later_best
from trainer.checkpoint_reader import CheckpointReader
from trainer.configuration import CHECKPOINTS, PLAN, PretrainConfig, TrainConfig
from trainer.dense_module import DenseModule
from trainer.item_lists import allowed_rows
from trainer.job import CheckpointClock, Job
from trainer.learner import Learner
from trainer.metric_log import MetricLog
from trainer.plain_engine import PlainEngine
from trainer.pretrain import train
from trainer.run_state import Progress, initialise_from, restore_progress

logger = logging.getLogger(__name__)


def pretrain(
    process: Process, config: PretrainConfig, config_document: dict[str, Any], reporter: Reporter
) -> dict[str, Any]:
    """A worker's whole life; a collective call.

    Returns the status ("finished" or "stopped"), the last and the best step, and the best selection metric.
    """
    return train(start_job(process, config, config_document, reporter))


def start_job(
    process: Process,
    config: PretrainConfig,
    config_document: dict[str, Any],
    reporter: Reporter,
    *,
    wrap: Callable[[Recommender, torch.dtype], DenseModule] = DenseModule,
    init_checkpoint: int | str = "best",
) -> Job:
    """Build the parts of a loop and bring the latest checkpoint back, or else the weights to start from; collective.

    `wrap(model, precision)` makes the module that the engine trains; `init_checkpoint` of the run of `init_from` has
    the weights to start from.
    """
    storage = Storage(config.run_dir)
    stream = TrainStream(config.data, seed=config.seed, rank=process.rank, world_size=process.world_size)
    assembly = assemble(config, process)
    checkpoints = storage.folder(CHECKPOINTS)
    saved_step = agree_on(newest_step(checkpoints), process)
    if saved_step < 0 and config.init_from:
        _initialise(config.init_from, assembly, init_checkpoint)
    learner, engine = make_learner(assembly, wrap)
    progress = Progress()
    if saved_step >= 0:
        progress = restore_newest(
            *(checkpoints, saved_step, process),
            lambda reader: restore_progress(reader, assembly, engine, config_document),
        )
        _reopen(progress, config.train)
    if progress.status == "running" and progress.position is not None:
        # Before anything of the run is replaced by what was given, which may not fit it.
        stream.check_position(progress.epoch, progress.position)
    if progress.status == "running":
        _check_validation(assembly)
    void_later_best(checkpoints, progress, process)
    if process.rank == 0:
        _describe_run(storage, assembly, config)
        if progress.status == "running":
            reporter.begun(progress.step)
    attempt = _attempt(storage, process)
    job = Job(
        config=config,
        config_document=config_document,
        process=process,
        reporter=reporter,
        storage=storage,
        assembly=assembly,
        stream=stream,
        learner=learner,
        engine=engine,
        checkpointer=_checkpointer(storage, process, attempt, config, reporter),
        audit=AuditLog(
            storage, attempt=attempt, rank=process.rank, first_step=progress.step, enabled=config.train.audit
        ),
        metric_log=_metric_log(config, config_document, progress) if process.rank == 0 else None,
        progress=progress,
        clock=CheckpointClock(config.train.checkpoint_every_s, progress.step),
    )
    # Staging memory is taken before the first step, not during it.
    job.checkpointer.prepare([*assembly.tables.pieces(), *engine.pieces()])
    return job


def _check_validation(assembly: Assembly) -> None:
    """Refuse what validation could not search with before the first step, and not behind an epoch; collective.

    Raises: as `Assembly.search`.
    """
    if isinstance(assembly.model, Generator):
        assembly.search(width=assembly.config.search.validation_width)
    elif not isinstance(assembly.model, Ranker):
        # The search itself would compute the vectors of all items.
        allowed_rows(assembly.config.search, assembly.items)
        assembly.conditions()


def _checkpointer(
    storage: Storage, process: Process, attempt: str, config: PretrainConfig, reporter: Reporter
) -> Checkpointer:
    return Checkpointer(
        storage.folder(CHECKPOINTS),
        rank=process.rank,
        world_size=process.world_size,
        attempt=attempt,
        keep_last=config.train.keep_last,
        gather_timeout_s=config.cluster.collective_timeout_s,
        on_commit=reporter.saved,
    )


def make_learner(
    assembly: Assembly, wrap: Callable[[Recommender, torch.dtype], DenseModule] = DenseModule
) -> tuple[Learner, Any]:
    """Wrap the dense part in the engine, and prove that this left the tables alone."""
    before = assembly.tables.checksums()
    module = assembly.module(wrap)
    engine = _make_engine(module, assembly)
    changed = [name for name, value in assembly.tables.checksums().items() if value != before[name]]
    if changed:
        raise PlanError(
            f"table rows must lie outside of the module that DeepSpeed wraps, yet starting it changed {changed}; "
            "no table may be a parameter of the model"
        )
    process = assembly.process
    learner = Learner(
        module,
        engine,
        assembly.tables,
        seed=assembly.config.seed,
        rank=process.rank,
        world_size=process.world_size,
    )
    return learner, engine


def _make_engine(module: DenseModule, assembly: Assembly) -> Any:
    """A DenseEngine, or a PlainEngine in the command's own process."""
    if assembly.config.cluster.in_process:
        return PlainEngine(module, assembly.config.train)
    from trainer.dense_engine import DenseEngine

    return DenseEngine(module, assembly.config.train, assembly.process)


def _initialise(source: str, assembly: Assembly, checkpoint: int | str = "best") -> None:
    run = Storage(source)
    if not run.exists(ITEMS_NAME):
        raise CheckpointError(
            f"--init-from needs the directory of a run with {ITEMS_NAME} and a checkpoint; {source} has none"
        )
    saved_items = pl.read_parquet(io.BytesIO(run.read(ITEMS_NAME)))["item_id"]
    checkpoints = run.folder(CHECKPOINTS)
    # That run may train on meanwhile, and ranks that look one after another find another best step.
    step = agree_on(CheckpointReader(checkpoints, checkpoint).step, assembly.process)
    initialise_from(CheckpointReader(checkpoints, step), saved_items, assembly)


def _reopen(progress: Progress, config: TrainConfig) -> None:
    """A run that ended may go on when its limits were raised."""
    over = progress.epoch >= config.epochs
    over |= config.max_steps is not None and progress.step >= config.max_steps
    over |= config.patience is not None and progress.validations_without_gain > config.patience
    progress.status = "finished" if over else "running"


def _describe_run(storage: Storage, assembly: Assembly, config: PretrainConfig) -> None:
    """Keep the plan and the items beside the checkpoints, so that a run explains itself."""
    plan = render_plan(assembly.tables.placements)
    for line in plan.splitlines():
        logger.info(line)
    storage.write(PLAN, plan.encode())
    if not storage.exists(ITEMS_NAME):
        storage.write(ITEMS_NAME, Storage(config.data.path).read(ITEMS_NAME))


def _attempt(storage: Storage, process: Process) -> str:
    """A name for this start: numbered, so that audits can order them, and never used twice."""
    number = agree_on(next_attempt(storage) if process.rank == 0 else 0, process)
    return f"{number:04d}-{agree_on(secrets.randbits(48), process):012x}"


def _metric_log(config: PretrainConfig, document: dict[str, Any], progress: Progress) -> MetricLog:
    return MetricLog(config.run_dir, config.log, document, resume_lines=progress.metric_lines)
