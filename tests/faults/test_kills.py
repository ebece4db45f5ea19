"""Jobs are killed or stopped in mid-run: the next start goes on, and nothing is lost and nothing taken twice.

A job that loses one worker goes on by itself: test_generator_kills.py.
"""

import os
import random
import signal

import pytest

from launch.cli import run as grail
from tests.faults.training import (
    ALONE,
    Training,
    assert_nothing_lost,
    last_step,
    latest_step,
    pretrain_line,
    send,
    wait_until_gone,
)
from tests.tiny_run import build_tiny_data

SEED = 20240229
WORKERS_GONE_S = 15
"""Far above the second or two it takes, since the machine may be busy."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The run directory of the same training without any fault, and in one process."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    assert grail(pretrain_line(data, run_dir, *ALONE)) == 0
    return run_dir


def test_a_job_killed_during_a_write_and_then_without_its_driver_goes_on(data, undisturbed, tmp_path):
    choice = random.Random(SEED + 1)
    run_dir = tmp_path / "run"
    line = pretrain_line(data, run_dir, "--train.checkpoint-every-steps", "1")
    with Training(run_dir, line) as training:
        training.wait_for_step(choice.randrange(6, 12))
        training.kill_everything_during_a_write()
    reached = last_step(run_dir)
    with Training(run_dir, line) as training:
        training.wait_for_step(reached + choice.randrange(4, 9))
        workers = training.workers()
        training.driver.kill()
        wait_until_gone(workers, WORKERS_GONE_S)
    assert latest_step(run_dir) >= reached
    assert grail([*line, *ALONE]) == 0
    assert_nothing_lost(run_dir, undisturbed)


def press_ctrl_c(training: Training) -> None:
    os.killpg(training.driver.pid, signal.SIGINT)


def end_container(training: Training) -> None:
    """SIGTERM to everything: driver, workers and Ray, as a container, a cgroup or a Slurm step is ended."""
    send(training.processes(), signal.SIGTERM)


def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(data, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    line = pretrain_line(data, run_dir)
    for step, end in ((5, press_ctrl_c), (15, end_container)):
        with Training(run_dir, line) as training:
            training.wait_for_step(step)
            end(training)
            assert training.exit_code() == 75, training.output()
            stopped = latest_step(run_dir)
            assert f"Stopped at step {stopped}. Go on with: grail pretrain {run_dir}/config.yaml" in (
                training.output()
            )
        assert stopped >= step
        line = ["pretrain", f"{run_dir}/config.yaml"]
    assert grail([*line, *ALONE]) == 0
    assert_nothing_lost(run_dir, undisturbed)
