"""Alignment, read from top to bottom: prompts, rollouts, rewards, advantages, update, weights out.

Every learner runs this loop; rank 0 beside it keeps the queues of rollout and reward workers.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from cluster.errors import PoolGoneError
from rl.guards import Guards
from rl.policy import PATHS, REFERENCE, experience
from rl.policy_version import age, version_of
from rl.prompts import PromptFeed, PromptStep
from rl.reference import Reference
from rl.rollout import Rollouts
from rl.scoring import Scored, Scorer
from rl.stopwatch import Means, Stopwatch
from rl.types import Completions
from trainer.feed import Agreement
from trainer.job import (
    Job,
    complete_step,
    end_epoch,
    finish,
    make_feed,
    planned_steps,
    save,
    validate,
    write_window,
)
from trainer.schedule import rate_fraction

logger = logging.getLogger(__name__)

HELD_OUT = "held_out"
"""Among the notes of a run: step -> metrics of its validation, that of the start at step 0."""


@dataclass(kw_only=True)
class Alignment:
    """What the loop works with beside the job; put together by `rl.start`."""

    job: Job
    start: int
    """Number of this start of the run, which policy versions begin with."""
    rollouts: Rollouts
    scorer: Scorer
    reference: Reference | None
    guards: Guards
    item_codes: Tensor
    """[N, L] codes of the catalogue, on the host."""
    max_staleness: int
    stop_on: tuple[str, ...]
    watch: Stopwatch
    means: Means = field(default_factory=Means)

    @property
    def version(self) -> int:
        """The policy that the learners hold."""
        return version_of(self.start, self.job.progress.step)


def align(alignment: Alignment) -> dict[str, Any]:
    """Align until the last epoch or step, a raised alarm that ends it, or a wish to stop; a collective call.

    Raises: DivergenceError if a loss or gradient is not finite; RewardError for a reward that is none.
    """
    job, watch = alignment.job, alignment.watch
    config, progress = job.config.train, job.progress
    feed = make_feed(job, PromptFeed)
    total_steps = planned_steps(config, job.stream)
    _keep_start(alignment)
    _publish(alignment)
    while progress.status == "running":
        prompts = feed.steps(progress.epoch, progress.position, progress.step)
        for step, agreement, begun in _ahead(alignment, prompts):
            with watch.measure("rollout"):
                drawn = _finished(alignment, begun)
            scored = alignment.scorer.score(drawn)
            if scored is None:
                progress.status = "stopped"
                break
            fraction = rate_fraction(progress.step, total_steps, config)
            with watch.measure("update"):
                learnt = _with_experience(alignment, step, scored)
                rates = config.learning_rate * fraction, config.table_learning_rate * fraction
                result = job.learner.step(learnt, *rates)
            _observe(alignment, scored)
            complete_step(
                job, step, agreement, result, partial(_write, alignment, feed, fraction, total_steps)
            )
            _heed_alarms(alignment)
            if progress.status != "running":
                break
            _publish(alignment)
        else:
            end_epoch(job)
            _heed_alarms(alignment)
    _validate_last(job)
    return {**finish(job), "notes": progress.notes}


def _keep_start(alignment: Alignment) -> None:
    """Evaluate and save the policy that alignment starts from: the first candidate for the best checkpoint."""
    job = alignment.job
    if job.progress.best is None:
        validate(job)
        save(job, best=True)


def _publish(alignment: Alignment) -> None:
    with alignment.watch.measure("rollout"):
        alignment.rollouts.settle()
    with alignment.watch.measure("transfer"):
        alignment.rollouts.publish(alignment.version)


def _ahead(
    alignment: Alignment, steps: Iterable[tuple[PromptStep, Agreement]]
) -> Iterator[tuple[PromptStep, Agreement, Any]]:
    """Steps whose drawing has begun, that of the next `max_staleness` ones too."""
    waiting: deque[tuple[PromptStep, Agreement, Any]] = deque()
    for step, agreement in steps:
        with alignment.watch.measure("rollout"):
            waiting.append((step, agreement, alignment.rollouts.begin(step)))
        if len(waiting) > alignment.max_staleness:
            yield waiting.popleft()
    yield from waiting


def _finished(alignment: Alignment, begun: Any) -> list[Completions] | None:
    try:
        return alignment.rollouts.finish(begun)
    except PoolGoneError as error:
        logger.error("%s", error)
        return None


def _with_experience(alignment: Alignment, step: PromptStep, scored: Scored) -> PromptStep:
    completions = scored.completions
    updates = age(completions.policy_version, alignment.version)
    assert updates is not None and updates <= alignment.max_staleness, (
        "rollouts let no other completions pass"
    )
    alignment.means.add(policy_age=updates)
    learnt = experience(step.prompts, completions, scored.advantages, alignment.item_codes)
    if alignment.reference is not None:
        learnt[REFERENCE] = alignment.reference.log_probabilities(step.prompts, learnt[PATHS])
    return step.with_experience(learnt)


def _observe(alignment: Alignment, scored: Scored) -> None:
    numbers = scored.numbers
    if not numbers:
        return  # a step without users says nothing of the policy
    alignment.means.add(**numbers)
    alignment.guards.observe(**{name: numbers[name] for name in ("reward", "entropy", "hallucination")})


def _write(alignment: Alignment, feed: PromptFeed, fraction: float, total_steps: int) -> None:
    numbers = {f"align/{name}": value for name, value in alignment.means.take().items()}
    numbers |= alignment.watch.shares() | {"align/policy_version": alignment.version}
    write_window(alignment.job, feed, fraction, total_steps, numbers)


def _heed_alarms(alignment: Alignment) -> None:
    """Warn of what has gone wrong, and end the run where it was asked for; the same on every rank."""
    progress = alignment.job.progress
    fatal = [alarm for alarm in alignment.guards.new_alarms() if alarm in alignment.stop_on]
    if fatal and progress.status == "running":
        progress.status = "halted"
        progress.notes["halted_by"] = fatal


def _validate_last(job: Job) -> None:
    if job.progress.status == "finished" and str(job.progress.step) not in job.progress.notes[HELD_OUT]:
        improved = validate(job)
        save(job, best=improved)
