"""Workers of an alignment are killed one after another: every user is a prompt once, and the result is the same."""

import random
import re
import signal
import time

import psutil
import pytest

from cluster.storage import Storage
from launch.cli import run as grail
from launch.config_document import to_document, to_yaml
from rl.configuration import RolloutConfig
from rl.reward_mix import RewardTerm
from rl.reward_pool import RewardPoolConfig
from rl.rewards.python_function import PythonFunction
from tests.faults.training import Training, send
from tests.process_group import run_on_processes
from tests.rl.tiny_alignment import EPOCHS, alignment, all_users, make_start, run_alignment, saved_state
from tests.tiny_run import assert_same_state, with_train
from trainer.audit import read_audit

SEED = 20251125


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return make_start(tmp_path_factory.mktemp("start"))


def rewarded_by(function):
    path = f"tests.rl.tiny_alignment:{function}"
    return (RewardTerm(name="near", reward=PythonFunction.Config(path=path)),)


def members(training, pool):
    """Processes of a pool that were announced last, by their place in it."""
    found = re.findall(rf"member (\d+) of the {pool} is ready \(pid (\d+)\)", training.output())
    alive = {place: int(pid) for place, pid in found}
    return [psutil.Process(pid) for pid in alive.values() if psutil.pid_exists(pid)]


def kill_one_of(training, pool, choice):
    training.wait_for(lambda: members(training, pool))
    choice.choice(members(training, pool)).kill()


def kill_until_the_end(training, pool):
    deadline = time.monotonic() + 60
    while training.driver.poll() is None and time.monotonic() < deadline:
        send(members(training, pool), signal.SIGKILL)
        time.sleep(0.05)


def test_whoever_is_killed_the_users_and_the_result_stay_the_same(start, tmp_path):
    undisturbed = alignment(start, tmp_path / "undisturbed", rewards=rewarded_by("near"))
    run_on_processes(run_alignment, 1, undisturbed, start)
    config = with_train(
        alignment(
            start,
            tmp_path / "run",
            rewards=rewarded_by("slowly"),
            rollout=RolloutConfig(workers=1, cpus_per_worker=0.5),
            reward=RewardPoolConfig(workers=2, cpus_per_worker=0.25, wait_s=0.2),
        ),
        checkpoint_every_steps=2,
    )
    (tmp_path / "align.yaml").write_text(to_yaml(to_document(config)))
    choice = random.Random(SEED)
    with Training(tmp_path / "run", ["align", str(tmp_path / "align.yaml")]) as training:
        training.wait_for_step(2)
        kill_one_of(training, "rollout pool", choice)
        training.wait_for_step(4)
        kill_one_of(training, "reward pool", choice)
        training.wait_for_step(7)
        (learner,) = training.workers()
        learner.kill()
        training.wait_for(lambda: "reward pool is ready" in training.output().partition("restart 1 of 3")[2])
        kill_until_the_end(training, "reward pool")
        assert training.exit_code() == 75, training.output()
        output = training.output()
    assert "member 0 of the rollout pool died" in output
    assert "the reward pool needs at least one of its 2 members" in output
    assert f"Go on with: grail align {tmp_path}/run/align.yaml" in output
    assert (
        grail(["align", f"{tmp_path}/run/align.yaml", "--reward.workers", "0", "--rollout.workers", "0"]) == 0
    )
    audit = read_audit(Storage(tmp_path / "run"))
    assert [sorted(audit[epoch]) for epoch in range(EPOCHS)] == [all_users()] * EPOCHS
    assert_same_state(saved_state(tmp_path / "run"), saved_state(tmp_path / "undisturbed"), tolerance=1e-5)
