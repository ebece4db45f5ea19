"""Kills a small training again and again at random moments, and proves that nothing was lost: make chaos.

A round is one run from its first to its last step. Each fault of a round comes at a random step, or a
random time after a start; then the same command is started again, except where a worker died, which the
running command has to mend by itself. In the end the audit, the metrics and the final state must be those of
a run without faults.
"""

import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from cluster.errors import GrailError
from tests.faults.training import (
    Training,
    assert_nothing_lost,
    last_step,
    metric_lines,
    pretrain_line,
    wait_until_gone,
)
from tests.tiny_run import build_tiny_data

WORKER, DRIVER, JOB, WRITE = "a worker", "the driver", "the job", "the job in a write"
FAULTS_PER_ROUND = 5
LAST_TARGET_STEP = 30
"""No fault is aimed at later steps, of which a run has 40, so that there is time left to strike."""
LONGEST_START_S = 12.0
WORKERS_GONE_S = 60.0

console = Console()


@dataclass(kw_only=True)
class Fault:
    """One kill, and what became of the run."""

    kind: str
    at: float
    """Wall clock, as in metrics.jsonl."""
    quiet_at: float = 0.0
    """When nothing of the killed job was left that could take a step."""
    recovery_s: float | None = None
    """Until the first step after it; None where the next fault came first."""
    survived: bool = False


def main(minutes: float = 20.0, seed: int = 0) -> int:
    """Try faults for about so many minutes; the exit code is 1 if anything was lost."""
    deadline, faults, losses, rounds = time.monotonic() + 60 * minutes, [], [], 0
    folder = Path(tempfile.mkdtemp(prefix="grail-chaos-"))
    data, undisturbed = build_tiny_data(folder / "data"), folder / "undisturbed"
    with Training(undisturbed, pretrain_line(data, undisturbed)) as training:
        assert training.exit_code() == 0, training.output()
    while time.monotonic() < deadline or not rounds:
        rounds += 1
        tried: list[Fault] = []
        loss = play_round(
            data, undisturbed, folder / f"round-{rounds}", random.Random(f"{seed} {rounds}"), tried
        )
        for fault in tried:
            fault.survived = loss is None
        faults += tried
        losses += [] if loss is None else [f"round {rounds}: {loss}"]
        console.print(
            f"round {rounds}: {', '.join(fault.kind for fault in tried) or 'no fault came in time'}"
        )
    console.print(_table(faults, rounds))
    for loss in losses:
        console.print(f"lost in {loss}", style="red", markup=False)
    if losses:
        console.print(f"The run directories are in {folder}", markup=False)
        return 1
    shutil.rmtree(folder)
    return 0


def play_round(
    data: str, undisturbed: Path, run_dir: Path, choice: random.Random, tried: list[Fault]
) -> str | None:
    """One run under faults -> what was lost, None where nothing was."""
    options = ("--train.checkpoint-every-steps", "1", "--cluster.max-restarts", str(FAULTS_PER_ROUND))
    try:
        torment(pretrain_line(data, run_dir, *options), run_dir, choice, tried)
        assert_nothing_lost(run_dir, undisturbed)
    except (AssertionError, GrailError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None


def torment(line: list[str], run_dir: Path, choice: random.Random, tried: list[Fault]) -> None:
    """Start the command until it finishes, with faults appended to `tried` as they happen."""
    for _ in range(FAULTS_PER_ROUND + 1):
        with Training(run_dir, line) as training:
            while len(tried) < FAULTS_PER_ROUND and _wait_for_moment(training, choice):
                _note_recovery(run_dir, tried)
                kind = choice.choice([WORKER, DRIVER, JOB, WRITE])
                tried.append(_strike(training, kind, choice))
                if tried[-1].kind != WORKER:
                    break
            else:
                code = training.exit_code()
                _note_recovery(run_dir, tried)
                assert code == 0, f"ended with {code}:\n{training.output()}"
                return


def _wait_for_moment(training: Training, choice: random.Random) -> bool:
    """Whether a moment for a fault came before the run was over or nearly so."""
    done = last_step(training.run_dir)
    if choice.random() < 0.25:
        until = time.monotonic() + choice.uniform(0, LONGEST_START_S)
        training.wait_for(lambda: training.driver.poll() is not None or time.monotonic() > until)
    elif done < LAST_TARGET_STEP:
        target = choice.randint(done + 1, min(done + 12, LAST_TARGET_STEP))
        training.wait_for_step(target)
        time.sleep(choice.uniform(0, 0.1))
    return training.driver.poll() is None and last_step(training.run_dir) < LAST_TARGET_STEP + 5


def _strike(training: Training, kind: str, choice: random.Random) -> Fault:
    """Kill; where there is no worker or no step yet, the whole job is killed as it is."""
    workers = training.workers()
    if kind in (WORKER, WRITE) and not (workers and last_step(training.run_dir)):
        kind = JOB
    fault = Fault(kind=kind, at=time.time())
    if kind == WORKER:
        choice.choice(workers).kill()
    elif kind == DRIVER:
        training.driver.kill()
        training.driver.wait(30)
        wait_until_gone(workers, WORKERS_GONE_S)
    elif kind == WRITE:
        training.kill_everything_during_a_write()
    else:
        training.kill_everything()
    fault.quiet_at = time.time()
    return fault


def _note_recovery(run_dir: Path, tried: list[Fault]) -> None:
    """To be called before the next start takes lines out of metrics.jsonl."""
    if tried and tried[-1].recovery_s is None:
        times = [line["time_s"] for line in metric_lines(run_dir) if line["time_s"] > tried[-1].quiet_at]
        tried[-1].recovery_s = min(times) - tried[-1].at if times else None


def _table(faults: list[Fault], rounds: int) -> Table:
    table = Table(
        title=f"{len(faults)} SIGKILLs in {rounds} run(s)", caption="recovery: from the kill to the next step"
    )
    for name in ("killed", "tried", "survived", "median recovery", "worst"):
        table.add_column(name, justify="left" if name == "killed" else "right")
    for kind in (WORKER, DRIVER, JOB, WRITE):
        chosen = [fault for fault in faults if fault.kind == kind]
        seconds = [fault.recovery_s for fault in chosen if fault.recovery_s is not None]
        figures = (f"{statistics.median(seconds):.1f} s", f"{max(seconds):.1f} s") if seconds else ("-", "-")
        table.add_row(kind, str(len(chosen)), str(sum(fault.survived for fault in chosen)), *figures)
    return table


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
