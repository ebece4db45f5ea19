"""The worker's side of a gang: an actor that runs one function and answers the driver meanwhile."""

import logging
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray

from cluster.configuration import ClusterConfig
from cluster.errors import ours
from cluster.faults import OTHERS_MISSING, kind_of
from cluster.logs import start_worker_logs
from cluster.packages import check_same
from cluster.process import start_process, stop_process
from cluster.reporter import Event, Pulse, Reporter
from cluster.watchdog import stacks_of_threads

logger = logging.getLogger(__name__)

_JOB_THREAD = "job"
_SHOWN_THREADS = (_JOB_THREAD, "checkpoint-")


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where an actor was placed and which rank it takes."""

    pid: int
    host: str
    """Ray's id of the node."""
    address: str
    gpus: tuple[str, ...]
    rank: int = 0
    local_rank: int = 0
    local_world_size: int = 1
    host_gpus: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What every worker of a gang is told."""

    function: Callable[..., Any]
    arguments: tuple
    rendezvous: str
    world_size: int
    config: ClusterConfig
    logs: Path | None


class GangWorker:
    """An actor that runs one function in a thread of its own, so that it can answer the driver meanwhile."""

    def describe(self, driver_root: Path, driver_fingerprint: str) -> Seat:
        check_same(driver_root, driver_fingerprint)
        return Seat(
            pid=psutil.Process().pid,
            host=ray.get_runtime_context().get_node_id(),
            address=ray.util.get_node_ip_address(),
            gpus=tuple(str(index) for index in ray.get_gpu_ids()),
        )

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def start(self, seat: Seat, assignment: Assignment) -> None:
        self.reporter = Reporter(seat.rank)
        start_worker_logs(self.reporter, assignment.logs)
        self._listen_for_sigterm()
        if seat.host_gpus:
            # Ray shows an actor its own accelerators only; libraries choose theirs by LOCAL_RANK among all.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seat.host_gpus)
        arguments = (seat, assignment, self.reporter)
        threading.Thread(target=_run, args=arguments, name=_JOB_THREAD, daemon=True).start()

    def poll(self) -> tuple[list[Event], Pulse]:
        return self.reporter.drain(), self.reporter.pulse()

    def request_stop(self) -> None:
        self.reporter.request_stop()

    def stacks(self) -> str:
        return stacks_of_threads(_SHOWN_THREADS)

    def _listen_for_sigterm(self) -> None:
        """What ends a whole host or container reaches the workers too: they save instead of dying."""

        def handle(number: int, frame: object) -> None:
            self.reporter.emit("stopping", {"signal": signal.Signals(number).name})
            self.reporter.request_stop()

        signal.signal(signal.SIGTERM, handle)
        # Ray was started with this signal blocked, and its children inherit that.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _run(seat: Seat, assignment: Assignment, reporter: Reporter) -> None:
    try:
        process = start_process(
            rank=seat.rank,
            world_size=assignment.world_size,
            local_rank=seat.local_rank,
            local_world_size=seat.local_world_size,
            rendezvous=assignment.rendezvous,
            num_threads=max(1, int(assignment.config.cpus_per_worker)),
            use_gpu=bool(seat.gpus),
            timeout_s=assignment.config.collective_timeout_s,
        )
        result = assignment.function(process, *assignment.arguments, reporter)
        stop_process()
        reporter.emit("result", {"value": result if seat.rank == 0 else None})
    except BaseException as error:  # whatever ends the function has to reach the driver
        values = {
            "error": None if isinstance(error, OTHERS_MISSING) else ours(error),
            "kind": kind_of(error),
            "summary": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "traceback": traceback.format_exc(),
        }
        logger.debug("this rank failed:\n%s", values["traceback"])
        reporter.emit("failure", values)


def give_ranks(seats: list[Seat], actors: list[Any]) -> tuple[list[Seat], list[Any]]:
    """Ranks in the order of the hosts, so that neighbours in rank are neighbours on a machine."""
    order = sorted(range(len(seats)), key=lambda index: seats[index].host)
    placed: list[Seat] = []
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
