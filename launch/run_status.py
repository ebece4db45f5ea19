"""How a run is doing, kept in its directory while it works: read by `grail status` and, as text, by Prometheus."""

import json
import logging
import os
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cluster.errors import CheckpointError, ConfigError, LeaseLostError
from cluster.lease import LEASE_NAME, lives_here, read_lease
from cluster.reporter import Event
from cluster.storage import Storage
from launch.run_directory import CONFIG, absolute
from trainer.checkpoint_pointers import LATEST, read_pointer
from trainer.configuration import CHECKPOINTS

STATUS_NAME = "status.json"
_EVERY_S = 5.0
_SILENT_S = 120.0

_GAUGES = {
    "step": ("grail_step", "Optimizer steps done."),
    "total_steps": ("grail_steps_planned", "Optimizer steps the schedule is laid out for."),
    "epoch": ("grail_epoch", "Pass over the data, from 1 on."),
    "loss": ("grail_train_loss", "Mean training loss since the last report."),
    "tokens_per_s": ("grail_train_tokens_per_second", "Supervised targets a second over all workers."),
    "step_s": ("grail_train_step_seconds", "Mean seconds of an optimizer step."),
    "workers": ("grail_workers", "Training processes."),
    "hosts": ("grail_hosts", "Hosts they run on."),
    "restarts": (
        "grail_restarts",
        "Times the workers were started again by this command, after faults and to grow.",
    ),
    "checkpoint_step": ("grail_checkpoint_step", "Step of the last checkpoint."),
    "checkpoint_at_s": ("grail_checkpoint_timestamp_seconds", "When it was taken."),
    "updated_at_s": ("grail_updated_timestamp_seconds", "When these numbers were written."),
}
STATES = ("running", "finished", "stopped", "halted", "failed")
"""An alignment is halted by an alarm."""

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Status:
    """The newest of everything; what is not known yet is None."""

    state: str = "running"
    recipe: str = ""
    error: str = ""
    """First line of what ended a failed run."""
    started_at_s: float = 0.0
    updated_at_s: float = 0.0
    step: int | None = None
    total_steps: int | None = None
    epoch: int | None = None
    epochs: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    step_s: float | None = None
    workers: int | None = None
    hosts: int | None = None
    restarts: int = 0
    checkpoint_step: int | None = None
    checkpoint_at_s: float | None = None


class StatusKeeper:
    """Listens to the events of a gang and writes; a context manager around the run, held by its driver."""

    def __init__(self, run_dir: str, recipe: str, prometheus_file: str | None = None):
        self._storage, self._prometheus_file, self._run_dir = Storage(run_dir), prometheus_file, run_dir
        self.status = Status(recipe=recipe)
        self._before, self._has_begun = self.status, False
        self._places: dict[int, str] = {}
        self._written_at = 0.0

    def __enter__(self) -> "StatusKeeper":
        # A run that goes on keeps its numbers until there are newer ones; read now that the lease is held.
        self._before = read_status(self._storage)
        self.status = replace(
            self._before,
            state="running",
            recipe=self.status.recipe,
            error="",
            started_at_s=time.time(),
        )
        self._write()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, LeaseLostError):
            return  # The run is another job's now, and so is what is said of it.
        if (
            isinstance(error, ConfigError | CheckpointError)
            and not self._has_begun
            and self._before.updated_at_s
        ):
            # Refused before anything was done: what the run is has not changed.
            self.status = self._before
            self._write()
        elif error is not None:
            self.end("failed", error)
        elif self.status.state == "running":
            self.end("stopped")

    def end(self, state: str, error: BaseException | None = None) -> None:
        self.status.state = state
        self.status.error = _first_lines(error) if error is not None else ""
        self._write()

    def on_event(self, event: Event) -> None:
        values, status = event.values, self.status
        if event.kind == "progress" and event.rank == 0:
            for name in ("step", "total_steps", "epoch", "epochs", "loss", "tokens_per_s", "step_s"):
                setattr(status, name, values[name])
        elif event.kind == "begun":
            self._has_begun = True
        elif event.kind == "saved":
            status.checkpoint_step, status.checkpoint_at_s = values["step"], time.time()
            status.step = max(status.step or 0, values["step"])
        elif event.kind == "started":
            if event.rank == 0:  # the first of a gang that is told of
                self._places.clear()
            self._places[event.rank] = values["host"]
            status.workers, status.restarts = values["workers"], values["restarts"]
            status.hosts = len(set(self._places.values()))
        if time.monotonic() - self._written_at >= _EVERY_S:
            self._write()

    def _write(self) -> None:
        self._written_at, self.status.updated_at_s = time.monotonic(), round(time.time(), 3)
        try:
            self._storage.write(STATUS_NAME, json.dumps(asdict(self.status), indent=1).encode())
            if self._prometheus_file is not None:
                _replace(self._prometheus_file, prometheus_text(self.status, self._run_dir))
        except OSError as error:
            logger.warning("the status of the run could not be written: %s", error)


def _first_lines(error: BaseException) -> str:
    """The first line, and the second where the first only announces it."""
    first, _, rest = str(error).partition("\n")
    return f"{first} {rest.partition(chr(10))[0].strip()}" if first.endswith(":") and rest else first


def prometheus_text(status: Status, run_dir: str) -> str:
    """The numbers in Prometheus' text format, each labelled with the run."""
    label = run_dir.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    lines = []
    for field_name, (name, description) in _GAUGES.items():
        value = getattr(status, field_name)
        if value is not None:
            lines += [
                f"# HELP {name} {description}",
                f"# TYPE {name} gauge",
                f'{name}{{run="{label}"}} {value}',
            ]
    lines += ["# HELP grail_state 1 for the state the run is in.", "# TYPE grail_state gauge"]
    lines += [
        f'grail_state{{run="{label}",state="{state}"}} {int(state == status.state)}' for state in STATES
    ]
    return "\n".join(lines) + "\n"


def _replace(path: str, text: str) -> None:
    """Never half a file: the collector may read at any moment."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w") as file:
        file.write(text)
    os.replace(temporary, path)


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What `grail status` says of one run."""

    run_dir: str
    state: str
    """One of STATES; `lost` where the job is gone without a word, `silent` where that cannot be known, `new` where
    nothing has been trained."""
    status: Status = field(default_factory=Status)
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    age_s: float | None = None
    """Since the last sign of life."""


def find_runs(folder: str) -> list[str]:
    """The run a folder is, or the runs right below it.

    Raises: ConfigError if there are none.
    """
    address = absolute(folder).rstrip("/")
    storage = Storage(address)
    if storage.exists(CONFIG):
        return [address]
    found = [f"{address}/{name}" for name in storage.list() if storage.exists(f"{name}/{CONFIG}")]
    if not found:
        raise ConfigError(
            f"directories of runs are needed, or folders of them, and {address} holds no {CONFIG} at its top or "
            "one level below; name another folder"
        )
    return found


def report_run(run_dir: str) -> RunReport:
    """Put together from the run's directory alone: status, lease and checkpoints."""
    storage, now = Storage(run_dir), time.time()
    status = read_status(storage)
    checkpoint = read_pointer(storage.folder(CHECKPOINTS), LATEST)
    saved_ns = storage.modified_ns(f"{CHECKPOINTS}/{LATEST}")
    saved_at = saved_ns / 1e9 if saved_ns else status.checkpoint_at_s
    signs = [status.updated_at_s, (storage.modified_ns(LEASE_NAME) or 0) / 1e9, saved_at or 0.0]
    age_s = max(0.0, now - max(signs)) if any(signs) else None
    return RunReport(
        run_dir=run_dir,
        state=_state(storage, status, age_s),
        status=status,
        checkpoint_step=checkpoint,
        checkpoint_age_s=None if saved_at is None or checkpoint is None else max(0.0, now - saved_at),
        age_s=age_s,
    )


def _state(storage: Storage, status: Status, age_s: float | None) -> str:
    if status.updated_at_s == 0.0:
        return "new"
    if status.state != "running":
        return status.state
    lease = read_lease(storage)
    alive = False if lease is None else lives_here(lease)
    if alive is None:
        return "running" if age_s is not None and age_s < _SILENT_S else "silent"
    return "running" if alive else "lost"


def read_status(storage: Storage) -> Status:
    """What the last driver wrote; an empty one where none did, or one of another version."""
    try:
        content: dict[str, Any] = json.loads(storage.read(STATUS_NAME))
        return Status(**content)
    except (FileNotFoundError, ValueError, TypeError):
        return Status()
