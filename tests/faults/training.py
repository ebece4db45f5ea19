"""A training started by the command line as a job of its own, the ways to end it, and what it left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from torch import Tensor

from cluster.packages import root
from cluster.storage import Storage
from tests.tiny_run import NUM_USERS, assert_same_state, read_all
from trainer.audit import read_audit
from trainer.checkpoint_reader import CheckpointReader

EPOCHS = 5
SMALL = (
    "--seed 3 --cluster.workers 2 --model.width 16 --model.num-blocks 1 --model.dropout 0 "
    "--data.max-length 10 --data.tokens-per-step 128 --data.num-streams 6 --data.shuffle-chunks 2 "
    "--train.precision fp32 --train.warmup-steps 2 --train.patience None "
    f"--train.epochs {EPOCHS} --train.checkpoint-every-s None --log.every-steps 1"
).split()
ALONE = ("--cluster.workers", "1", "--cluster.in-process")
"""Without Ray: what a run of several workers must equal, and what finishes one in a second instead of twenty."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(root()), "OMP_NUM_THREADS": "1"}


def pretrain_line(data: str, run_dir: Path, *options: str) -> list[str]:
    """The words behind `grail` of a small training of SASRec on two workers, without dropout."""
    return recipe_line("sasrec", data, run_dir, "--objective.num-negatives", "32", *options)


def recipe_line(recipe: str, data: str, run_dir: Path, *options: str) -> list[str]:
    """The same of any recipe whose model has blocks called so."""
    return ["pretrain", recipe, "--data.path", data, "--run-dir", str(run_dir), *SMALL, *options]


class Training:
    """The job of a command line; nothing of it outlives the `with` block."""

    def __init__(
        self,
        run_dir: Path,
        line: list[str],
        *,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] = ENVIRONMENT,
    ):
        """`prefix` are the words that start a command on another host."""
        self.run_dir, self.line, self.prefix, self.environment = run_dir, line, prefix, environment
        self.known: set[psutil.Process] = set()

    def __enter__(self) -> "Training":
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.log = self.run_dir.parent / f"{self.run_dir.name}.txt"
        with open(self.log, "w") as log:
            self.driver = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "launch.cli", *self.line],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_everything()

    def processes(self) -> list[psutil.Process]:
        """Driver, workers and Ray; those seen once are remembered, since a dead parent shows no children."""
        with suppress(psutil.NoSuchProcess):
            driver = psutil.Process(self.driver.pid)
            self.known |= {driver, *driver.children(recursive=True)}
        return [process for process in self.known if runs(process)]

    def workers(self) -> list[psutil.Process]:
        """The training processes, in the order of their ids; fewer while a gang starts."""
        found = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                found += [process] if process.name().startswith("ray::GangWorker") else []
        return sorted(found, key=lambda process: process.pid)

    def members(self, pool: str) -> list[psutil.Process]:
        """Processes of a pool that were announced last, by their place in it; those that still run."""
        found = re.findall(rf"member (\d+) of the {pool} is ready \(pid (\d+)\)", self.output())
        latest = {place: int(pid) for place, pid in found}
        return [psutil.Process(pid) for pid in latest.values() if psutil.pid_exists(pid)]

    def wait_for(self, happened: Callable[[], bool], timeout_s: float = 150) -> None:
        """Return once something happened. Raises: AssertionError if the command ends first, or time is up."""
        deadline = time.monotonic() + timeout_s
        while not happened():
            assert self.driver.poll() is None, f"ended with {self.driver.returncode}:\n{self.output()}"
            assert time.monotonic() < deadline, f"nothing after {timeout_s} s:\n{self.output()}"
            time.sleep(0.005)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: last_step(self.run_dir) >= step)

    def exit_code(self, timeout_s: float = 150) -> int:
        return self.driver.wait(timeout_s)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def kill_everything(self) -> None:
        """SIGKILL to the whole job at one moment: all are halted first, so that nobody sees another die."""
        halted: set[psutil.Process] = set()
        while new := set(self.processes()) - halted:
            send(new, signal.SIGSTOP)
            halted |= new
        send(halted, signal.SIGKILL)
        self.driver.wait(30)
        wait_until_gone(halted, 30)

    def kill_everything_during_a_write(self) -> None:
        """The same at a moment at which a checkpoint has been begun and is not complete."""
        while True:
            self.wait_for(lambda: writes_checkpoint(self.run_dir))
            workers = self.workers()
            send(workers, signal.SIGSTOP)
            if writes_checkpoint(self.run_dir):
                return self.kill_everything()
            send(workers, signal.SIGCONT)


def send(processes, number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(processes, timeout_s: float) -> float:
    """Seconds until none of them runs. Raises: AssertionError naming those left."""
    begun = time.monotonic()
    while left := [process for process in processes if runs(process)]:
        assert time.monotonic() - begun < timeout_s, f"still there after {timeout_s} s: {left}"
        time.sleep(0.02)
    return time.monotonic() - begun


def metric_lines(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(run_dir: Path) -> int:
    lines = metric_lines(run_dir)
    return lines[-1]["step"] if lines else 0


def writes_checkpoint(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("step-*.tmp"))


def latest_step(run_dir: Path) -> int:
    return json.loads((run_dir / "checkpoints" / "LATEST").read_text())["step"]


def saved_state(run_dir: Path) -> dict[str, Tensor]:
    """Tables, dense weights and optimizer state of the latest checkpoint."""
    reader = CheckpointReader(Storage(run_dir / "checkpoints"), "latest")
    return {name: read_all(reader, name) for name in sorted(reader.tensors)}


def reported(run_dir: Path) -> list[tuple[int, str, float]]:
    """Losses and validation metrics of metrics.jsonl, in the order of the file."""
    return [
        (line["step"], name, value)
        for line in metric_lines(run_dir)
        for name, value in line.items()
        if name == "train/loss" or name.startswith("validation/")
    ]


def assert_everyone_was_seen_once(run_dir: Path, epochs: int = EPOCHS) -> None:
    """In every epoch, by the account of the steps that count."""
    audit = read_audit(Storage(run_dir))
    assert sorted(audit) == list(range(epochs))
    for epoch, users in audit.items():
        assert sorted(users) == list(range(NUM_USERS)), f"epoch {epoch} did not see each user exactly once"


def assert_nothing_lost(run_dir: Path, undisturbed: Path, epochs: int = EPOCHS) -> None:
    """Every user of every epoch once, the numbers of every step once, the state of a run without faults."""
    assert_everyone_was_seen_once(run_dir, epochs)
    names, expected = (
        [(step, name) for step, name, _ in reported(folder)] for folder in (run_dir, undisturbed)
    )
    assert names == expected
    for (step, name, value), (*_, wanted) in zip(reported(run_dir), reported(undisturbed), strict=True):
        assert abs(value - wanted) <= 1e-4 * abs(wanted), f"{name} at step {step}: {value} and {wanted}"
    assert_same_state(saved_state(run_dir), saved_state(undisturbed), tolerance=1e-6)
    leftovers = [path.name for path in (run_dir / "checkpoints").iterdir() if ".tmp" in path.name]
    assert not leftovers
