"""A gang: workers of one process group that start together, and start again together after a fault."""

import logging
import math
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError, RayTaskError

from cluster.configuration import ClusterConfig
from cluster.elastic import largest_world
from cluster.errors import ClusterError, PlanError
from cluster.faults import COLLECTIVE, DEATH, MEMORY, FaultHistory, kind_of_death
from cluster.gang_worker import Assignment, GangWorker, Seat, give_ranks
from cluster.logs import show_worker_record, worker_log
from cluster.packages import fingerprint, root
from cluster.placement import ACTOR_DIED, Placement, death_cause, free_room, place_largest
from cluster.ray_start import start_ray
from cluster.reporter import Event, StopSignal
from cluster.storage import Storage
from cluster.watchdog import Watchdog

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_TIMEOUTS_TO_STOP, _TIMEOUTS_OF_STEP = 2, 6
"""Times `cluster.collective_timeout_s` until a gang that saves and ends, and one in the middle of a step, is taken for
hanging: a step may wait for several rollout workers in turn."""
_DEATH_GRACE_S = 5.0
_LOOK_FOR_ROOM_S = 3.0
_STACKS_S = 3.0
_GOODBYE_S = 2.0


class _Fault(Exception):
    """The attempt is over and may be repeated; the message says which rank failed and why."""

    def __init__(self, kind: str, cause: str):
        super().__init__(cause)
        self.kind = kind


def run_gang(
    function: Callable[..., Any],
    *arguments: Any,
    config: ClusterConfig,
    run_dir: str,
    on_event: Callable[[Event], None] | None = None,
    stop: StopSignal | None = None,
    worlds: Sequence[int] | None = None,
) -> Any:
    """Call `function(process, *arguments, reporter)` on `config.workers` processes; return rank 0's result.

    When a worker dies, runs out of memory or a collective fails, the whole gang is started again and the
    function goes on from its own checkpoint. With `worlds` (see `allowed_worlds`) the gang has as many workers
    as the cluster has room for; where there is room for more, it stops at its next `reporter.saved` and starts
    again larger, so the function must honour `stop_requested` and be able to go on. A world on which the plan does
    not work (PlanError) is left for a larger one, or for one that has worked before.

    Log records of the workers are shown here, other events go to `on_event`. A SIGTERM that reaches any worker
    requests the stop. Returns None where a stop was requested and the gang had not started or had died.

    Raises: the workers' own GrailError; the error of `stop.abort`; ClusterError if there is no room, or faults
    come too often or always at one step; RuntimeError with the worker's traceback for any other error.
    """
    start_ray(config)
    stop, worlds = stop or StopSignal(), list(worlds or [config.workers])
    history, starts, worked = FaultHistory(run_dir, config.max_restarts), 0, set()
    while not stop.requested:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="grail-") as directory:
            gang = _Gang(config, worlds, Path(directory), stop, on_event, _log_directory(run_dir))
            try:
                gang.start(function, arguments, starts)
                result = gang.follow()
                if stop.requested or not gang.makes_room:
                    return result
                fault = None
            except _Fault as error:
                fault = error
            except PlanError as error:
                worlds, fault = _others_than(gang.size, worlds, worked, error), None
            except ClusterError:
                if not stop.requested:
                    raise
                fault = None  # why it was to stop says more than what came of that
            finally:
                gang.kill()
        starts += 1
        if gang.watchdog.step is not None:
            worked.add(gang.size)
        if fault and not stop.requested:
            lasted_s = time.monotonic() - begun
            history.add(
                *(fault.kind, str(fault)), step=gang.watchdog.step, workers=gang.size, lasted_s=lasted_s
            )
            logger.warning(
                "%s, %.1f s after the start; starting all %s workers again (restart %d of %d)",
                *(fault, lasted_s, _range(worlds), history.without_gain, config.max_restarts),
            )
    if stop.error is not None:
        raise stop.error
    return None


def _others_than(size: int, worlds: Sequence[int], worked: Collection[int], error: PlanError) -> list[int]:
    """The worlds left once the plan did not work on `size` workers. Raises: the error where none is."""
    others = [world for world in worlds if world != size and (world > size or world in worked)]
    if not others:
        raise error
    logger.warning("%s; going on with %s workers as soon as there is room", error, _range(others))
    return others


def _range(worlds: Sequence[int]) -> str:
    return str(worlds[0]) if len(worlds) == 1 else f"{worlds[0]} to {worlds[-1]}"


def _log_directory(run_dir: str) -> Path | None:
    storage = Storage(run_dir)
    return Path(storage.path("logs")) if storage.is_local else None


def _kind(error: RayError) -> str:
    """Of the death of an actor, as Ray tells of it."""
    return MEMORY if isinstance(error, OutOfMemoryError) else DEATH


class _Gang:
    """One attempt of a gang: from placing the workers to killing them."""

    def __init__(
        self,
        config: ClusterConfig,
        worlds: Sequence[int],
        directory: Path,
        stop: StopSignal,
        on_event: Callable[[Event], None] | None,
        logs: Path | None,
    ):
        self.config, self.worlds, self.directory = config, worlds, directory
        self.stop, self.on_event, self.logs = stop, on_event or (lambda event: None), logs
        self.watchdog = Watchdog()
        self.makes_room = False
        """Whether this gang was told to stop because a larger one fits."""
        self.placement: Placement | None = None
        self.actors: list[Any] = []
        self.seats: list[Seat] = []
        self._results: dict[int, Any] = {}
        self._failures: dict[int, Event] = {}
        self._failed_at = math.inf
        self._may_grow = False
        self._told_at = math.inf
        """When the workers were told to stop."""
        self._looked_at = time.monotonic()

    @property
    def size(self) -> int:
        return len(self.actors)

    def start(self, function: Callable[..., Any], arguments: tuple, restarts: int) -> None:
        """Place the actors, give out the ranks and start the function on each."""
        config, begun = self.config, time.monotonic()
        self.placement = place_largest(
            self.worlds,
            cpus=config.cpus_per_worker,
            gpus=config.gpus_per_worker,
            timeout_s=config.start_timeout_s,
            stop=self.stop,
        )
        self._log_sizes = [self._log_size(rank) for rank in range(self.placement.size)]
        self.actors = [self.placement.actor(GangWorker, index) for index in range(self.placement.size)]
        seats = self._get([actor.describe.remote(root(), fingerprint()) for actor in self.actors])
        self.seats, self.actors = give_ranks(seats, self.actors)
        assignment = Assignment(
            function=function,
            arguments=arguments,
            rendezvous=self._rendezvous(),
            world_size=self.size,
            config=config,
            logs=self.logs,
        )
        shared = ray.put(assignment)
        self._get([a.start.remote(seat, shared) for a, seat in zip(self.actors, self.seats, strict=True)])
        hosts = len({seat.host for seat in self.seats})
        logger.info(
            "%d worker(s) on %d host(s) started in %.1f s", self.size, hosts, time.monotonic() - begun
        )
        for seat in self.seats:
            values = {"pid": seat.pid, "host": seat.address, "restarts": restarts, "workers": self.size}
            self.on_event(Event(kind="started", rank=seat.rank, values=values))

    def follow(self) -> Any:
        """Pass events on until every worker has returned; return rank 0's result."""
        pending = {actor.poll.remote(): rank for rank, actor in enumerate(self.actors)}
        while len(self._results) < self.size:
            for event in self._poll(pending):
                self._take(event)
            if self.stop.error is not None:
                raise self.stop.error
            if (self.stop.requested or self.makes_room) and self._told_at == math.inf:
                self._told_at = time.monotonic()
                for actor in self.actors:
                    actor.request_stop.remote()
            if self._failures:
                self._judge_failures()
            self._look_for_room()
            self._judge_silence()
            if (late := self.watchdog.late()) is not None:
                logger.warning("%s\n%s", late, self._stacks())
            time.sleep(_POLL_S)
        return self._results[0]

    def kill(self) -> None:
        """End the actors and wait until those of this machine are gone, so that none writes any more."""
        for actor in self.actors:
            ray.kill(actor)
        if self.placement is not None:
            self.placement.remove()
        here = ray.util.get_node_ip_address()
        own = [seat.pid for seat in self.seats if seat.address == here]
        begun = time.monotonic()
        while left := [pid for pid in own if psutil.pid_exists(pid)]:
            waited = time.monotonic() - begun
            if waited > _GOODBYE_S:
                # A halted process does not hear Ray.
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            if waited > 10:
                break
            time.sleep(0.02)

    def _take(self, event: Event) -> None:
        if event.kind == "log":
            show_worker_record(event)
        elif event.kind == "result":
            self._results[event.rank] = event.values["value"]
        elif event.kind == "failure":
            if event.values["error"] is not None:
                raise event.values["error"]
            self._failures[event.rank] = event
            self._failed_at = min(self._failed_at, time.monotonic())
        else:
            if event.kind == "stopping" and not self.stop.requested:
                logger.warning("%s on rank %d: saving and stopping", event.values["signal"], event.rank)
                self.stop.request()
            self.makes_room |= event.kind == "saved" and self._may_grow
            self.on_event(event)

    def _judge_silence(self) -> None:
        """Workers that all hang, such as on a file system that does not answer, sit in no collective that times out."""
        limit, since_told = self.config.collective_timeout_s, time.monotonic() - self._told_at
        if since_told > _TIMEOUTS_TO_STOP * limit:
            raise _Fault(COLLECTIVE, f"the workers were told to stop {since_told:.0f} s ago and go on")
        if (waiting_s := self.watchdog.waiting_s()) > _TIMEOUTS_OF_STEP * limit:
            raise _Fault(COLLECTIVE, f"a step has taken {waiting_s:.0f} s, and nothing in it gave up")

    def _judge_failures(self) -> None:
        """A collective fails where another rank died or failed, which may show a moment later: that one counts."""
        for rank, failure in sorted(self._failures.items()):
            kind = failure.values["kind"]
            if kind not in (None, COLLECTIVE):
                raise _Fault(kind, f"rank {rank} failed: {kind}, {failure.values['summary']}")
        if time.monotonic() - self._failed_at < _DEATH_GRACE_S:
            return
        for rank, failure in sorted(self._failures.items()):
            if failure.values["kind"] is None:
                raise RuntimeError(f"rank {rank} failed:\n{failure.values['traceback']}")
        rank, failure = min(self._failures.items())
        raise _Fault(COLLECTIVE, f"rank {rank} failed: {COLLECTIVE}, {failure.values['summary']}")

    def _look_for_room(self) -> None:
        """Notice when a larger gang fits; this one goes on until its next checkpoint."""
        now = time.monotonic()
        if self._may_grow or self.size == self.worlds[-1] or now - self._looked_at < _LOOK_FOR_ROOM_S:
            return
        self._looked_at = now
        own = Counter(seat.host for seat in self.seats)
        size = largest_world(self.worlds, free_room(self.placement.bundle, own))
        if size and size > self.size:
            self._may_grow = True
            logger.info(
                "the cluster has room for %d workers: growing from %d after the next checkpoint",
                size,
                self.size,
            )

    def _poll(self, pending: dict[Any, int]) -> list[Event]:
        found = []
        for reference in ray.wait(list(pending), num_returns=len(pending), timeout=_POLL_S)[0]:
            rank = pending.pop(reference)
            try:
                events, pulse = ray.get(reference)
            except ACTOR_DIED as error:
                raise self._death(rank, error) from error
            found += events
            self.watchdog.hear(rank, pulse)
            pending[self.actors[rank].poll.remote()] = rank
        return found

    def _death(self, rank: int, error: RayError) -> _Fault:
        kind, last_words = _kind(error), ""
        if self.logs is not None and kind == DEATH:
            kind, last_words = kind_of_death(worker_log(self.logs, rank), self._log_sizes[rank])
        cause = f"rank {rank} (pid {self.seats[rank].pid}) died: {death_cause(error)}"
        return _Fault(kind, f"{cause} [{kind}: {last_words}]" if last_words else cause)

    def _log_size(self, rank: int) -> int:
        """Where this attempt's lines begin: logs are appended to."""
        path = worker_log(self.logs, rank) if self.logs else None
        return path.stat().st_size if path and path.is_file() else 0

    def _stacks(self) -> str:
        asked = [actor.stacks.remote() for actor in self.actors]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_STACKS_S)
        texts = []
        for rank, reference in enumerate(asked):
            text = "it does not answer"
            with suppress(*ACTOR_DIED):
                text = ray.get(reference) if reference in answered else text
            texts.append(f"rank {rank} (pid {self.seats[rank].pid} on {self.seats[rank].address}): {text}")
        return "\n".join(texts)

    def _rendezvous(self) -> str:
        if {seat.host for seat in self.seats} == {ray.get_runtime_context().get_node_id()}:
            return f"file://{self.directory}/rendezvous"
        return f"tcp://{self.seats[0].address}:{self._get([self.actors[0].free_port.remote()])[0]}"

    def _get(self, references: list[Any]) -> list[Any]:
        try:
            return ray.get(references, timeout=self.config.start_timeout_s)
        except RayTaskError as error:
            raise error.cause from error
        except ACTOR_DIED as error:
            raise _Fault(_kind(error), f"a worker died while starting: {death_cause(error)}") from error
        except GetTimeoutError as error:
            raise _Fault(
                COLLECTIVE,
                f"{len(references)} workers were to start within {self.config.start_timeout_s:.0f} s and "
                "did not; look at the load of the machine, or raise --cluster.start-timeout-s",
            ) from error
