"""The numbers of a run over its steps: metrics.jsonl always, Weights & Biases where asked for."""

import json
import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any

from cluster.errors import ConfigError
from cluster.storage import Storage
from trainer.configuration import LogConfig

METRICS_NAME = "metrics.jsonl"
WANDB_NAME = "wandb.json"
_REMOTE_WRITE_S = 30.0
_PAUSE = 100
"""A pause between two writes of the whole file lasts so many times as long as the last of them took."""

logger = logging.getLogger(__name__)


class MetricLog:
    """Appends one line of JSON per call of `write`; to be held by rank 0 only.

    Lines beyond the first `resume_lines` are taken out when it opens: what they tell will be done again. (The
    step alone would not say it: a checkpoint can lie between a step and the validation of that step.)
    """

    def __init__(
        self, run_dir: str, config: LogConfig, document: Mapping[str, Any], *, resume_lines: int = 0
    ):
        self._storage = Storage(run_dir)
        self._lines = _whole_lines(self._storage)[:resume_lines]
        self.num_lines = len(self._lines)
        self._storage.write(METRICS_NAME, "".join(self._lines).encode())
        self._file = None
        if self._storage.is_local:
            self._lines.clear()
            self._file = open(self._storage.path(METRICS_NAME), "a", buffering=1)
        self._write_next_at = time.monotonic() + _REMOTE_WRITE_S
        self._wandb = None if config.wandb == "off" else _start_wandb(self._storage, config, document)

    def write(self, step: int, numbers: Mapping[str, float | int]) -> None:
        line = json.dumps({"step": step, "time_s": round(time.time(), 3), **numbers}) + "\n"
        self.num_lines += 1
        if self._file is not None:
            self._file.write(line)
        else:
            self._lines.append(line)
            if time.monotonic() > self._write_next_at:
                self._write_whole()
        if self._wandb is not None:
            self._wandb.log({"step": step, **numbers})

    def flush(self) -> None:
        """Have all lines in storage: a checkpoint that counts them must not be kept without them."""
        if self._file is None:
            self._write_whole()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write_whole(self) -> None:
        """Object stores cannot append: the file is replaced now and then, the more rarely the longer that takes."""
        started = time.monotonic()
        self._storage.write(METRICS_NAME, "".join(self._lines).encode())
        ended = time.monotonic()
        self._write_next_at = ended + max(_REMOTE_WRITE_S, _PAUSE * (ended - started))


def read_metrics(run_dir: str) -> list[dict[str, float | int]]:
    """All lines of a run's metrics.jsonl; empty where there is none."""
    return [json.loads(line) for line in _whole_lines(Storage(run_dir))]


def _whole_lines(storage: Storage) -> list[str]:
    if not storage.exists(METRICS_NAME):
        return []
    lines = storage.read(METRICS_NAME).decode().splitlines(keepends=True)
    # A killed process may leave a last line without its end.
    return [line for line in lines if line.endswith("\n")]


def _start_wandb(storage: Storage, config: LogConfig, document: Mapping[str, Any]) -> Any:
    """Raises: ConfigError where the package is missing, nobody is logged in, or its server does not answer."""
    try:
        import wandb  # only where it is asked for
    except ImportError as error:
        raise ConfigError(
            f"--log.wandb {config.wandb} needs the package wandb, and it is not there ({error}); install it, or give "
            "--log.wandb off"
        ) from error
    try:
        run = wandb.init(
            project=config.project,
            id=_wandb_id(storage),
            resume="allow",
            mode=config.wandb,
            dir=storage.path("") if storage.is_local else None,
            config=dict(document),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise ConfigError(
            f"--log.wandb {config.wandb} must be able to start a run of project {config.project}, and W&B says: "
            f"{' '.join(str(error).split()).rstrip('.')}; mend that, or give --log.wandb offline and send it later by "
            "`wandb sync`"
        ) from error
    # W&B drops lines of steps it has seen; as an ordinary number a step may come again after a resume.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    logger.info("W&B run %s of project %s (%s)", run.id, config.project, config.wandb)
    return run


def _wandb_id(storage: Storage) -> str:
    """The run's id, kept in the run directory so that a resumed run goes on in the same W&B run."""
    if storage.exists(WANDB_NAME):
        return json.loads(storage.read(WANDB_NAME))["id"]
    run_id = secrets.token_hex(4)
    storage.write(WANDB_NAME, json.dumps({"id": run_id}).encode())
    return run_id
