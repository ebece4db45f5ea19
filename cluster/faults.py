"""Faults a gang survives by starting again: told apart, counted, and reported where they only come back."""

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.errors import ClusterError, MeetingError, MissingRanksError
from cluster.storage import Storage

logger = logging.getLogger(__name__)

FAULTS_NAME = "faults.json"
DEATH = "a dead worker"
MEMORY = "out of memory"
COLLECTIVE = "a failed collective"
OTHERS_MISSING = (MeetingError, MissingRanksError)
"""Errors of a rank that waited for others in vain: faults, unlike all other errors of ours."""

SAME_FAULT_LIMIT = 3
_KEPT = 100
_LOG_TAIL_BYTES = 20_000
_ADVICE = {
    DEATH: "look at the end of that worker's log and at the memory of its host",
    MEMORY: "raise --train.micro-batches, set --train.activation-checkpointing, or use more workers",
    COLLECTIVE: "look at the network between the hosts and for a worker that hangs; raise "
    "--cluster.collective-timeout-s if it was only slow",
}
_GLOO = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Wait timeout",
)
_NCCL = ("Watchdog caught collective operation timeout", "NCCL error", "ncclRemoteError", "ncclSystemError")
_OUT_OF_MEMORY = ("CUDA out of memory", "DefaultCPUAllocator: can't allocate memory")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Why an attempt of a gang ended."""

    kind: str
    cause: str
    """A sentence without its end: which rank, and what happened."""
    step: int | None
    """Steps that were done when it happened; of a death, those the driver had heard of; None before any was told."""
    workers: int
    lasted_s: float
    """From the start of the attempt."""
    time_s: float
    """Wall clock."""


def kind_of(error: BaseException) -> str | None:
    """The kind of a fault that a start from the latest checkpoint may mend; None for any other error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in text for sign in _OUT_OF_MEMORY
    ):
        return MEMORY
    if isinstance(error, (dist.DistError, *OTHERS_MISSING)) or any(sign in text for sign in (*_GLOO, *_NCCL)):
        return COLLECTIVE
    return None


def kind_of_death(log: Path, first_byte: int) -> tuple[str, str]:
    """Kind and last words of a worker that died, from the end of its log, of which `first_byte` is its own first.

    NCCL's watchdog ends the process where a collective timed out, so only the log tells it from other deaths.
    """
    if not log.is_file():
        return DEATH, ""
    with open(log, "rb") as file:
        file.seek(max(first_byte, log.stat().st_size - _LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    for signs, kind in ((_NCCL, COLLECTIVE), (_OUT_OF_MEMORY, MEMORY)):
        for line in reversed(lines):
            if any(sign in line for sign in signs):
                return kind, line.strip()[:300]
    return DEATH, ""


class FaultHistory:
    """The faults of a run; decides whether to start again, and keeps them in the run directory.

    What earlier commands on the same run met counts as far as the same fault at the same step is concerned.
    """

    def __init__(self, run_dir: str, max_restarts: int):
        self._storage, self._run_dir, self._max_restarts = Storage(run_dir), run_dir, max_restarts
        self.faults = self._read()
        self.without_gain = 0
        """Restarts since the gang last got further than ever before."""
        self._furthest = 0

    def add(self, kind: str, cause: str, *, step: int | None, workers: int, lasted_s: float) -> None:
        """Note a fault that is to be followed by a restart.

        Raises: ClusterError with a report where the same fault came three times at the same step, or too many
        came in a row.
        """
        fault = Fault(
            kind=kind,
            cause=cause,
            step=step,
            workers=workers,
            lasted_s=lasted_s,
            time_s=round(time.time(), 3),
        )
        self.faults.append(fault)
        self._write()
        if step is not None and step > self._furthest:
            self._furthest, self.without_gain = step, 0
        last = self.faults[-SAME_FAULT_LIMIT:]
        if (
            step is not None
            and [(entry.kind, entry.step) for entry in last] == [(kind, step)] * SAME_FAULT_LIMIT
        ):
            raise ClusterError(
                f"{kind} at step {step} must not come back after every restart, and it came "
                f"{SAME_FAULT_LIMIT} times:\n{self._report(last)}\n{_ADVICE[kind]}, then start again to go on "
                "from the latest checkpoint"
            )
        if self.without_gain >= self._max_restarts:
            raise ClusterError(
                f"the {workers} workers must live to the end of the run, and {cause}, after "
                f"{self.without_gain} restarts; look into {self._run_dir}/logs, and start again to go on from "
                "the latest checkpoint"
            )
        self.without_gain += 1

    def _report(self, faults: list[Fault]) -> str:
        return "\n".join(
            f"  {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(fault.time_s))}  {fault.workers} workers, "
            f"{fault.lasted_s:.1f} s after the start: {fault.cause}"
            for fault in faults
        )

    def _read(self) -> list[Fault]:
        try:
            return [Fault(**entry) for entry in json.loads(self._storage.read(FAULTS_NAME))]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s is begun anew: %s", self._storage.path(FAULTS_NAME), error)
            return []

    def _write(self) -> None:
        content = [asdict(fault) for fault in self.faults[-_KEPT:]]
        try:
            self._storage.write(FAULTS_NAME, json.dumps(content, indent=1).encode())
        except OSError as error:  # a full disk, say: the restart matters more
            logger.warning("%s could not be written: %s", self._storage.path(FAULTS_NAME), error)
