"""From a configuration to an alignment ready to run: the policy restored or begun, pools of workers started."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cluster.process import Process
from cluster.reporter import Reporter
from data_streams.item_table import ItemTable
from rl.configuration import AlignConfig
from rl.drawing import Drawing
from rl.guards import Guards
from rl.heartbeat import Heartbeat
from rl.loop import HELD_OUT, Alignment, align
from rl.places import Places
from rl.policy import PolicyModule
from rl.policy_version import new_start
from rl.reference import Reference
from rl.reward_pool import OwnRewards, RewardPool, Rewards
from rl.rewards import RewardSetting
from rl.rollout import OwnRollouts, PooledRollouts, Rollouts
from rl.scoring import Scorer
from rl.stopwatch import Stopwatch
from trainer.assembly import load_semantic_ids
from trainer.configuration import PretrainConfig
from trainer.dense_module import resolve_precision
from trainer.job import Job
from trainer.start import start_job


def start_alignment(
    process: Process,
    config: AlignConfig,
    start: PretrainConfig,
    start_step: int,
    document: dict[str, Any],
    setting: RewardSetting,
    places: Places,
    reporter: Reporter,
) -> dict[str, Any]:
    """A learner's whole life; a collective call.

    Returns what `trainer.start.pretrain` does, and the notes of the run.
    """
    policy, objective = config.policy(start), config.objective.build()
    drawing = _make_drawing(config, policy, process)
    wrap = partial(PolicyModule, objective=objective, drawing=drawing)
    job = start_job(process, policy, document, reporter, wrap=wrap, init_checkpoint=start_step)
    notes, watch = job.progress.notes, Stopwatch()
    with _pools(config, job, drawing, setting, places) as (rollouts, rewards):
        alignment = Alignment(
            job=job,
            start=new_start(job.storage, process),
            rollouts=rollouts,
            scorer=Scorer(
                *(rewards, config.advantage.build(), process, watch, Heartbeat(process, config.cluster)),
                stop_requested=reporter.stop_requested,
            ),
            reference=_reference(objective.needs_reference, start, start_step, job, drawing),
            guards=_guards(notes, job),
            item_codes=torch.from_numpy(job.assembly.semantic_ids.codes),
            max_staleness=config.align.max_staleness,
            stop_on=config.align.stop_on,
            watch=watch,
        )
        return align(alignment)


def _make_drawing(config: AlignConfig, policy: PretrainConfig, process: Process) -> Drawing:
    table = load_semantic_ids(policy, ItemTable.load(policy.data.path))
    return Drawing(
        config.align,
        torch.from_numpy(table.codes).to(process.device),
        table.code_sizes,
        seed=config.seed,
        precision=resolve_precision(config.train.precision, process.device),
    )


@contextmanager
def _pools(
    config: AlignConfig, job: Job, drawing: Drawing, setting: RewardSetting, places: Places
) -> Iterator[tuple[Rollouts, Rewards | None]]:
    """Both pools start while the other does; only rank 0 holds their queues."""
    parts = job.assembly, job.engine, drawing
    rewards: Rewards | None = None
    rollouts: Rollouts = OwnRollouts(*parts)
    if config.rollout.workers:
        rollouts = PooledRollouts(
            *parts,
            config=config.rollout,
            cluster=config.cluster,
            placement=places.rollout,
            stop_requested=job.reporter.stop_requested,
        )
    try:
        if job.process.rank == 0:
            rewards = _make_rewards(config, setting, places)
        yield rollouts, rewards
    finally:
        rollouts.close()
        if rewards is not None:
            rewards.close()


def _make_rewards(config: AlignConfig, setting: RewardSetting, places: Places) -> Rewards:
    if not config.reward.workers:
        return OwnRewards(config.rewards, setting)
    return RewardPool(
        config.rewards, setting, config=config.reward, cluster=config.cluster, placement=places.reward
    )


def _reference(
    is_needed: bool, start: PretrainConfig, start_step: int, job: Job, drawing: Drawing
) -> Reference | None:
    """Always of the step that the first start of the run found, though the other run may have gone on since."""
    kept = job.progress.notes.setdefault("start_step", start_step)
    if not is_needed:
        return None
    # Its tables lie over the learners of now, however many trained it, and it reads the prompts of now.
    own = job.config
    spread = replace(start, cluster=own.cluster, sharding=own.sharding, data=own.data)
    return Reference.load(spread, kept, job.process, drawing)


def _guards(notes: dict[str, Any], job: Job) -> Guards:
    guards = Guards.of(notes.get("guards"))
    # The same objects, so that every checkpoint holds what was observed until then.
    notes["guards"] = vars(guards)
    held_out, metric = notes.setdefault(HELD_OUT, {}), job.config.train.selection_metric
    # A run that goes on may select by another metric than before.
    so_far = [held_out[step] for step in sorted(held_out, key=int)]
    guards.observe_held_out_again(metrics[metric] for metrics in so_far if metric in metrics)

    def remember(metrics) -> None:
        held_out[str(job.progress.step)] = dict(metrics)
        guards.observe_held_out(metrics[metric])

    job.after_validation = remember
    return guards
