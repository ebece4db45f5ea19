"""A gang: workers of one process group that start together, and start again together when one dies."""

import logging
import math
import os
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from cluster.configuration import ClusterConfig
from cluster.errors import ClusterError, GrailError
from cluster.logs import show_worker_record, start_worker_logs
from cluster.packages import check_same, fingerprint, root
from cluster.placement import Placement, death_cause, place
from cluster.process import start_process, stop_process
from cluster.ray_start import start_ray
from cluster.reporter import Event, Reporter, StopSignal
from cluster.storage import Storage

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_DEATH_GRACE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class _Seat:
    """Where an actor was placed and which rank it takes."""

    pid: int
    host: str
    address: str
    gpus: tuple[str, ...]
    rank: int = 0
    local_rank: int = 0
    local_world_size: int = 1
    host_gpus: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What every worker of a gang is told."""

    function: Callable[..., Any]
    arguments: tuple
    rendezvous: str
    world_size: int
    config: ClusterConfig
    logs: Path | None


class _WorkerDied(Exception):
    """A worker's process is gone; the message says which and why."""


class _Worker:
    """An actor that runs one function in a thread of its own, so that it can answer the driver meanwhile."""

    def describe(self, driver_root: Path, driver_fingerprint: str) -> _Seat:
        check_same(driver_root, driver_fingerprint)
        return _Seat(
            pid=psutil.Process().pid,
            host=ray.get_runtime_context().get_node_id(),
            address=ray.util.get_node_ip_address(),
            gpus=tuple(str(index) for index in ray.get_gpu_ids()),
        )

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def start(self, seat: _Seat, job: _Job) -> None:
        self.reporter = Reporter(seat.rank)
        start_worker_logs(self.reporter, job.logs)
        if seat.host_gpus:
            # Ray shows an actor its own accelerators only; libraries choose theirs by LOCAL_RANK among all.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seat.host_gpus)
        threading.Thread(target=_run_job, args=(seat, job, self.reporter), daemon=True).start()

    def poll(self) -> list[Event]:
        return self.reporter.drain()

    def request_stop(self) -> None:
        self.reporter.request_stop()


def _run_job(seat: _Seat, job: _Job, reporter: Reporter) -> None:
    try:
        process = start_process(
            rank=seat.rank,
            world_size=job.world_size,
            local_rank=seat.local_rank,
            local_world_size=seat.local_world_size,
            rendezvous=job.rendezvous,
            num_threads=max(1, int(job.config.cpus_per_worker)),
            use_gpu=bool(seat.gpus),
            timeout_s=job.config.collective_timeout_s,
        )
        result = job.function(process, *job.arguments, reporter)
        stop_process()
        reporter.emit("result", {"value": result if seat.rank == 0 else None})
    except BaseException as error:  # whatever ends the function has to reach the driver
        known = error if isinstance(error, GrailError) else None
        reporter.emit("failure", {"error": known, "traceback": traceback.format_exc()})


def run_gang(
    function: Callable[..., Any],
    *arguments: Any,
    config: ClusterConfig,
    run_dir: str,
    on_event: Callable[[Event], None] | None = None,
    restart: bool = True,
    stop: StopSignal | None = None,
) -> Any:
    """Call `function(process, *arguments, reporter)` on `config.workers` processes; return rank 0's result.

    When a worker dies the whole gang is started again, at most `config.max_restarts` times; the function
    goes on from its own checkpoint. Log records of the workers are shown here, other events go to
    `on_event`. Returns None where a stop was requested and the gang had not started or had died.

    Raises: the workers' own GrailError; ClusterError if there is no room or workers die too often;
    RuntimeError with the worker's traceback for any other error.
    """
    start_ray(config)
    stop = stop or StopSignal()
    restarts = 0
    while not stop.requested:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="grail-") as directory:
            gang = _Gang(config, Path(directory), stop)
            try:
                gang.start(function, arguments, _log_directory(run_dir), restarts, on_event)
                return gang.follow(on_event)
            except _WorkerDied as death:
                cause = str(death)
            except ClusterError:
                if stop.requested:
                    return None
                raise
            finally:
                gang.kill()
        if stop.requested:
            break
        if not restart or restarts >= config.max_restarts:
            raise ClusterError(
                f"the {config.workers} workers must live to the end of the run, and {cause}, after "
                f"{restarts} restarts; look into {run_dir}/logs, and start again to go on from the latest "
                "checkpoint"
            )
        restarts += 1
        logger.warning(
            "%s, %.1f s after the start; starting all %d workers again (restart %d of %d)",
            *(cause, time.monotonic() - begun, config.workers, restarts, config.max_restarts),
        )
    return None


def _log_directory(run_dir: str) -> Path | None:
    storage = Storage(run_dir)
    return Path(storage.path("logs")) if storage.is_local else None


class _Gang:
    """One attempt of a gang: from placing the workers to killing them."""

    def __init__(self, config: ClusterConfig, directory: Path, stop: StopSignal):
        self.config, self.directory, self.stop = config, directory, stop
        self.placement: Placement | None = None
        self.actors: list[Any] = []
        self.seats: list[_Seat] = []

    def start(
        self,
        function: Callable[..., Any],
        arguments: tuple,
        logs: Path | None,
        restarts: int,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        """Place the actors, give out the ranks and start the function on each."""
        config, begun = self.config, time.monotonic()
        self.placement = place(
            config.workers,
            cpus=config.cpus_per_worker,
            gpus=config.gpus_per_worker,
            timeout_s=config.start_timeout_s,
            stop=self.stop,
        )
        self.actors = actors = [self.placement.actor(_Worker, index) for index in range(config.workers)]
        seats = self._get([actor.describe.remote(root(), fingerprint()) for actor in actors])
        self.seats, self.actors = _give_ranks(seats, actors)
        job = _Job(
            function=function,
            arguments=arguments,
            rendezvous=self._rendezvous(),
            world_size=config.workers,
            config=config,
            logs=logs,
        )
        shared = ray.put(job)
        self._get([a.start.remote(seat, shared) for a, seat in zip(self.actors, self.seats, strict=True)])
        hosts = len({seat.host for seat in self.seats})
        logger.info(
            "%d worker(s) on %d host(s) started in %.1f s", config.workers, hosts, time.monotonic() - begun
        )
        for seat in self.seats if on_event else ():
            values = {"pid": seat.pid, "host": seat.address, "restarts": restarts}
            on_event(Event(kind="started", rank=seat.rank, values=values))

    def follow(self, on_event: Callable[[Event], None] | None) -> Any:
        """Pass events on until every worker has returned; return rank 0's result."""
        results: dict[int, Any] = {}
        failure: Event | None = None
        told, deadline = False, math.inf
        pending = {actor.poll.remote(): rank for rank, actor in enumerate(self.actors)}
        while len(results) < len(self.actors):
            if self.stop.requested and not told:
                told = True
                for actor in self.actors:
                    actor.request_stop.remote()
            for event in self._poll(pending):
                if event.kind == "log":
                    show_worker_record(event)
                elif event.kind == "result":
                    results[event.rank] = event.values["value"]
                elif event.kind == "failure":
                    if event.values["error"] is not None:
                        raise event.values["error"]
                    if failure is None:
                        failure, deadline = event, time.monotonic() + _DEATH_GRACE_S
                elif on_event:
                    on_event(event)
            # A worker fails too when another one dies; the death shows a moment later and means a restart.
            if failure and time.monotonic() > deadline:
                raise RuntimeError(f"rank {failure.rank} failed:\n{failure.values['traceback']}")
            time.sleep(_POLL_S)
        return results[0]

    def kill(self) -> None:
        """End the actors and wait until those of this machine are gone, so that none writes any more."""
        for actor in self.actors:
            ray.kill(actor)
        if self.placement is not None:
            self.placement.remove()
        here = ray.util.get_node_ip_address()
        deadline = time.monotonic() + 10
        for seat in self.seats:
            while seat.address == here and psutil.pid_exists(seat.pid) and time.monotonic() < deadline:
                time.sleep(0.02)

    def _poll(self, pending: dict[Any, int]) -> list[Event]:
        events = []
        for reference in ray.wait(list(pending), num_returns=len(pending), timeout=_POLL_S)[0]:
            rank = pending.pop(reference)
            try:
                events += ray.get(reference)
            except RayActorError as error:
                raise _WorkerDied(
                    f"rank {rank} (pid {self.seats[rank].pid}) died: {death_cause(error)}"
                ) from error
            pending[self.actors[rank].poll.remote()] = rank
        return events

    def _rendezvous(self) -> str:
        if len({seat.host for seat in self.seats}) == 1:
            return f"file://{self.directory}/rendezvous"
        return f"tcp://{self.seats[0].address}:{self._get([self.actors[0].free_port.remote()])[0]}"

    def _get(self, references: list[Any]) -> list[Any]:
        try:
            return ray.get(references, timeout=self.config.start_timeout_s)
        except RayTaskError as error:
            raise error.cause from error
        except RayActorError as error:
            raise _WorkerDied(f"a worker died while starting: {death_cause(error)}") from error
        except GetTimeoutError as error:
            raise ClusterError(
                f"{len(references)} workers were to start within {self.config.start_timeout_s:.0f} s and "
                "did not; look at the load of the machine, or raise --cluster.start-timeout-s"
            ) from error


def _give_ranks(seats: list[_Seat], actors: list[Any]) -> tuple[list[_Seat], list[Any]]:
    """Ranks in the order of the hosts, so that neighbours in rank are neighbours on a machine."""
    order = sorted(range(len(seats)), key=lambda index: seats[index].host)
    placed: list[_Seat] = []
    for rank, index in enumerate(order):
        on_host = [seat for seat in seats if seat.host == seats[index].host]
        placed.append(
            replace(
                seats[index],
                rank=rank,
                local_rank=sum(seat.host == seats[index].host for seat in placed),
                local_world_size=len(on_host),
                host_gpus=tuple(gpu for seat in on_host for gpu in seat.gpus),
            )
        )
    return placed, [actors[index] for index in order]
