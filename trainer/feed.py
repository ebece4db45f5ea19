"""The steps of an epoch, the same number on every rank, each prepared and agreed upon one step ahead."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cluster.process import Process, all_gather_equal
from data_streams.batch import SequenceBatch
from data_streams.prefetch import prefetched
from data_streams.stream import TrainStream
from models.recommender import Recommender, StepContext
from sharding.lookup import ItemFeatures
from trainer.step_input import StepInput, prepare_step

_NONE = -1


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What all ranks know about a step before it begins."""

    stop: bool
    """Some rank was asked to stop: all save and end after this step."""
    checkpoint_after: int | None
    """Step of the last checkpoint, where by the clock of rank 0 the next one was due when this was agreed on; void
    if another one has been saved since. None where none was due."""


class Feed:
    """Turns this rank's stream of batches into steps that all ranks take together.

    A rank whose streams have run out takes part with empty batches until the last rank has run out. Counts and
    flags travel over the host group while the step before is computed.
    """

    def __init__(
        self,
        stream: TrainStream,
        model: Recommender,
        item_features: ItemFeatures | None,
        process: Process,
        *,
        seed: int,
        micro_batches: int,
        prefetch_steps: int,
        stop_requested: Callable[[], bool],
        checkpoint_after: Callable[[], int | None],
    ):
        self.stream, self.model, self.item_features, self.process = stream, model, item_features, process
        self.seed, self.micro_batches, self.prefetch_steps = seed, micro_batches, prefetch_steps
        self.stop_requested, self.checkpoint_after = stop_requested, checkpoint_after
        self.wait_s = 0.0
        """Seconds spent waiting for data since the start."""

    def steps(
        self, epoch: int, position: Mapping[str, Any] | None, first_step: int
    ) -> Iterator[tuple[StepInput, Agreement]]:
        """The steps of an epoch from a position on; `first_step` counts optimizer steps of the whole run.

        Raises: DataError, the same on all ranks, at the end of a whole epoch in which none of them had anything to
        learn from.
        """
        prepared = prefetched(self._prepared(epoch, position, first_step), self.prefetch_steps)
        try:
            upcoming = self._announce(next(prepared), self.stream.own_position(epoch, position))
            while (current := upcoming.agree()) is not None:
                upcoming = self._announce(self._timed_next(prepared), current[0].position)
                yield current
            if position is None:
                self._check_epoch()
        finally:
            prepared.close()

    def _check_epoch(self) -> None:
        """A rank knows its own share only, so all add up what they met; a collective call."""
        own = self.stream.epoch_totals
        totals = torch.tensor(list(own.values()))
        dist.all_reduce(totals, group=self.process.host_group)
        self.stream.check_epoch(dict(zip(own, totals.tolist(), strict=True)))

    def _timed_next(self, prepared: Iterator) -> tuple[StepInput, bool]:
        started = time.perf_counter()
        item = next(prepared)
        self.wait_s += time.perf_counter() - started
        return item

    def _prepared(
        self, epoch: int, position: Mapping[str, Any] | None, step: int
    ) -> Iterator[tuple[StepInput, bool]]:
        """Prepared steps and whether this rank has run out; goes on with empty ones for ever."""
        for batch in self.stream.batches(epoch, position):
            yield self._prepare(batch, step), False
            step += 1
        while True:
            yield self._prepare(self.stream.empty_batch(), step), True
            step += 1

    def _prepare(self, batch: SequenceBatch, step: int) -> StepInput:
        context = StepContext(
            step=step, seed=self.seed, rank=self.process.rank, world_size=self.process.world_size
        )
        return prepare_step(
            self.model, batch, context, self.micro_batches, self.item_features, self.process.device
        )

    def _announce(self, item: tuple[StepInput, bool], position: Mapping[str, Any]) -> "_Exchange":
        prepared, ended = item
        if prepared.position is None:
            prepared = prepared.at(position)
        after = self.checkpoint_after()
        flags = [int(ended), int(self.stop_requested()), _NONE if after is None else after]
        return _Exchange(prepared, flags, self.process)


class _Exchange:
    """One rank's counts and flags on their way to all others."""

    def __init__(self, prepared: StepInput, flags: list[int], process: Process):
        self.prepared = prepared
        counts = [micro.num_targets for micro in prepared.micro_batches]
        own = torch.tensor(counts + flags)
        self.everyone = own.new_empty(process.world_size, len(own))
        self.work = all_gather_equal(self.everyone.view(-1), own, group=process.host_group, async_op=True)

    def agree(self) -> tuple[StepInput, Agreement] | None:
        """The step with the counts of all ranks, or None once every rank has run out."""
        self.work.wait()
        num_micro = len(self.prepared.micro_batches)
        ended, stop, after = self.everyone[:, num_micro:].T
        if ended.all():
            return None
        counts = self.everyone[:, :num_micro].T.tolist()
        saved = int(after[0])
        agreement = Agreement(stop=bool(stop.any()), checkpoint_after=None if saved == _NONE else saved)
        return self.prepared.with_counts(counts), agreement
