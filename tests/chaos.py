"""Brings one fault after the other on a small training, and proves that nothing was lost: make chaos.

A round is one run from its first to its last step, in one of four places (tests/faults/strikes.py). Each fault of a
round comes at a random step, or a random time after a start; then the same command is started again, but for those
that the running command has to mend by itself. In the end the audit must count every user of every epoch once, the
metrics and the final state must be those of a run without faults (but for rounding where the number of workers
changed), and the quality must lie within the spread of undisturbed runs of several seeds.
"""

import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from cluster.errors import GrailError
from tests.faults.strikes import (
    ENDS_THE_COMMAND,
    EPOCHS,
    KINDS,
    SIGKILLS,
    Fault,
    NoDiskError,
    Scene,
    StepWatch,
    on_a_small_disk,
    on_an_alignment,
    on_this_machine,
    on_two_hosts,
    strike,
)
from tests.faults.training import (
    Training,
    assert_everyone_was_seen_once,
    assert_nothing_lost,
    last_step,
    metric_lines,
    pretrain_line,
    saved_state,
)
from tests.faults.two_hosts import NoHostsError
from tests.tiny_run import assert_same_state, build_tiny_data

PLACES: tuple[Callable[[Path], AbstractContextManager[Scene]], ...] = (
    on_this_machine,
    on_a_small_disk,
    on_two_hosts,
    on_an_alignment,
)
"""Taken in turn."""
LAST_TARGET_STEP = 70
"""No fault is aimed at later steps, of which a run has 80, so that there is time left to strike."""
SOONEST, LATEST = 2, 6
"""Steps from one fault to the next. The driver must hear of one between two, or they are the same fault to it."""
LONGEST_START_S = 12.0
QUALITY = "validation/ndcg@10"
VERSION = "align/policy_version"
ROUNDING = 1e-3
SEEDS = (3, 4, 5)
"""Of the undisturbed runs; the first is that of the disturbed ones."""

console = Console()


def main(minutes: float = 20.0, kills: int = 50, seed: int = 0) -> int:
    """Try faults for about so many minutes, up to half as long again while so many SIGKILLs are not made; the exit code
    is 1 if anything was lost.
    """
    begun, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="grail-chaos-"))
    data = build_tiny_data(folder / "data")
    undisturbed = [train_undisturbed(data, folder / f"seed-{number}", number) for number in SEEDS]
    console.print(f"undisturbed, {QUALITY} of seeds {SEEDS}: {_numbers(undisturbed)}")
    faults, losses, rounds = [], [], 0
    while (spent := (time.monotonic() - begun) / 60) < minutes or (
        spent < 1.5 * minutes and count_kills(faults) < kills
    ):
        place, name = PLACES[rounds % len(PLACES)], f"round-{rounds + 1}"
        rounds += 1
        tried: list[Fault] = []
        choice = random.Random(f"{seed} {rounds}")
        loss = play_round(place, data, undisturbed, folder / name, choice, tried)
        for fault in tried:
            fault.survived = loss is None
        faults += tried
        losses += [] if loss is None else [f"{name}: {loss}"]
        told = ", ".join(fault.kind for fault in tried) or "no fault came in time"
        console.print(f"{name}, {place.__name__}: {told}{'' if loss is None else ': LOST'}", markup=False)
    console.print(_table(faults, rounds, (time.monotonic() - begun) / 60))
    console.print(f"{count_kills(faults)} of {kills} SIGKILLs were made.")
    for loss in losses:
        console.print(f"lost in {loss}", style="red", markup=False)
    if losses:
        console.print(f"The run directories are in {folder}", markup=False)
        return 1
    shutil.rmtree(folder)
    return 0


def train_undisturbed(data: str, run_dir: Path, seed: int) -> Path:
    with Training(
        run_dir, pretrain_line(data, run_dir, "--seed", str(seed), "--train.epochs", str(EPOCHS))
    ) as training:
        assert training.exit_code() == 0, training.output()
    return run_dir


def play_round(
    place: Callable[[Path], AbstractContextManager[Scene]],
    data: str,
    undisturbed: list[Path],
    folder: Path,
    choice: random.Random,
    tried: list[Fault],
) -> str | None:
    """One run under faults, which are appended to `tried` -> what was lost, None where nothing was."""
    loss = None
    try:
        with place(folder) as scene, StepWatch(scene.run_dir) as watch:
            try:
                torment(scene, data, choice, tried)
                judge(scene, undisturbed)
            except (AssertionError, GrailError, subprocess.TimeoutExpired) as error:
                loss = str(error)
            finally:
                for fault, following in zip(tried, [*tried[1:], None], strict=True):
                    _note_recovery(fault, following, watch)
    except (NoHostsError, NoDiskError) as error:
        console.print(f"{place.__name__} was left out: {error}", style="yellow", markup=False)
    except subprocess.CalledProcessError as error:
        loss = loss or f"{error}: {error.stderr}"
    return loss


def torment(scene: Scene, data: str, choice: random.Random, tried: list[Fault]) -> None:
    """Start the command until it finishes, with faults appended to `tried` as they happen."""
    kinds: list[str] = []
    for _ in range(scene.most_faults + 1):
        scene.mend()
        with scene.training(data) as training:
            while len(tried) < scene.most_faults and _wait_for_moment(training, choice):
                kinds = kinds or choice.sample(scene.kinds, len(scene.kinds))
                tried.append(strike(scene, training, kinds.pop(), choice))
                if tried[-1].kind in ENDS_THE_COMMAND:
                    break
                scene.mend()
            else:
                code = training.exit_code()
                assert code == 0, f"ended with {code}:\n{training.output()}"
                return


def judge(scene: Scene, undisturbed: list[Path]) -> None:
    """Raises: AssertionError naming what differs."""
    if scene.undisturbed is not None:
        judge_alignment(scene.run_dir, scene.undisturbed)
        return
    if scene.same_workers:
        assert_nothing_lost(scene.run_dir, undisturbed[0], EPOCHS)
    assert_everyone_was_seen_once(scene.run_dir, EPOCHS)
    reached, usual = _quality(scene.run_dir), [_quality(run_dir) for run_dir in undisturbed]
    console.print(
        f"{QUALITY} after the faults: {reached:.4f}, undisturbed {min(usual):.4f} to {max(usual):.4f}"
    )
    assert min(usual) - ROUNDING <= reached <= max(usual) + ROUNDING, (
        f"{QUALITY} is {reached}, of undisturbed runs {usual}"
    )


def judge_alignment(run_dir: Path, undisturbed: Path) -> None:
    """Prompts once in each epoch, versions of the policy never twice, the same policy in the end.

    Raises: AssertionError naming what differs.
    """
    assert_everyone_was_seen_once(run_dir, EPOCHS)
    versions = [line[VERSION] for line in metric_lines(run_dir) if VERSION in line]
    assert versions == sorted(set(versions)), f"versions of the policy were used twice: {versions}"
    assert_same_state(saved_state(run_dir), saved_state(undisturbed), tolerance=1e-5)


def _quality(run_dir: Path) -> float:
    return [line[QUALITY] for line in metric_lines(run_dir) if QUALITY in line][-1]


def _numbers(run_dirs: list[Path]) -> str:
    return ", ".join(f"{_quality(run_dir):.4f}" for run_dir in run_dirs)


def _wait_for_moment(training: Training, choice: random.Random) -> bool:
    """Whether a moment for a fault came before the run was over or nearly so."""
    done = last_step(training.run_dir)
    if choice.random() < 0.25:
        until = time.monotonic() + choice.uniform(0, LONGEST_START_S)
        training.wait_for(lambda: training.driver.poll() is not None or time.monotonic() > until)
    elif done < LAST_TARGET_STEP:
        target = done + choice.randint(SOONEST, LATEST)
        training.wait_for_step(target)
        time.sleep(choice.uniform(0, 0.1))
    return training.driver.poll() is None and last_step(training.run_dir) < LAST_TARGET_STEP + 5


def _note_recovery(fault: Fault, following: Fault | None, watch: StepWatch) -> None:
    stepped_at = watch.first_after(fault.quiet_at)
    if stepped_at is not None and (following is None or stepped_at < following.at):
        fault.recovery_s = stepped_at - fault.at


def count_kills(faults: list[Fault]) -> int:
    return sum(fault.kind in SIGKILLS for fault in faults)


def _table(faults: list[Fault], rounds: int, minutes: float) -> Table:
    table = Table(
        title=f"{len(faults)} faults in {rounds} runs, {count_kills(faults)} of them SIGKILLs, {minutes:.1f} minutes",
        caption="recovery: from the fault to the next step; not known where another fault came before",
    )
    for name in ("fault", "tried", "survived", "median recovery", "worst"):
        table.add_column(name, justify="left" if name == "fault" else "right")
    for kind in (*KINDS, "all"):
        chosen = [fault for fault in faults if kind in (fault.kind, "all")]
        seconds = [fault.recovery_s for fault in chosen if fault.recovery_s is not None]
        figures = (f"{statistics.median(seconds):.1f} s", f"{max(seconds):.1f} s") if seconds else ("-", "-")
        table.add_row(kind, str(len(chosen)), str(sum(fault.survived for fault in chosen)), *figures)
    return table


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
