"""What `make chaos` keeps account of, on a place where nothing is trained."""

import random
import subprocess
from contextlib import contextmanager
from types import SimpleNamespace

import psutil
import pytest
import torch

from tests import chaos
from tests.faults import strikes
from tests.faults.strikes import CLOCK, DRIVER, JOB, REWARD, ROLLOUT, WORKER, Fault, NoDiskError, Scene

DICE = random.Random(0)


class StubTraining:
    """Steps are taken whenever somebody asks; a strike that ends the command is noted."""

    def __init__(self, run_dir):
        self.run_dir, self.driver, self.killed = run_dir, SimpleNamespace(poll=lambda: None), False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def kill_everything(self):
        self.killed = True

    def exit_code(self):
        return 0


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Every moment is one for a fault, and a strike does nothing."""
    scene = Scene(run_dir=tmp_path / "run", kinds=(WORKER, DRIVER, CLOCK), most_faults=5)
    scene.training = lambda data: StubTraining(scene.run_dir)
    monkeypatch.setattr(chaos, "_wait_for_moment", lambda training, choice: True)
    monkeypatch.setattr(chaos, "strike", lambda scene, training, kind, choice: Fault(kind=kind))

    @contextmanager
    def stub(folder):
        yield scene

    return stub


def play(place, tmp_path, tried=None):
    return chaos.play_round(place, "data", [], tmp_path, DICE, [] if tried is None else tried)


def test_a_round_strikes_each_kind_as_often_as_it_is_named(place, tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "judge", lambda scene, undisturbed: None)
    tried: list[Fault] = []
    assert play(place, tmp_path, tried) is None
    assert len(tried) == 5 and {fault.kind for fault in tried[:3]} == {WORKER, DRIVER, CLOCK}
    assert chaos.count_kills([Fault(kind=kind) for kind in (WORKER, CLOCK, JOB)]) == 2
    assert chaos._table(tried, 1, 0.1).row_count == len(strikes.KINDS) + 1


def test_what_a_judge_finds_is_the_loss_of_the_round(place, tmp_path, monkeypatch):
    def judge(scene, undisturbed):
        raise AssertionError("epoch 3 did not see each user exactly once")

    monkeypatch.setattr(chaos, "judge", judge)
    assert play(place, tmp_path) == "epoch 3 did not see each user exactly once"


def test_a_place_that_cannot_be_made_is_left_out_and_one_that_breaks_is_a_loss(
    tmp_path, monkeypatch, place, capsys
):
    @contextmanager
    def no_disk(folder):
        raise NoDiskError("must be superuser")
        yield

    @contextmanager
    def stuck(folder):
        with place(folder) as scene:
            yield scene
        raise subprocess.CalledProcessError(1, "umount", stderr="busy")

    monkeypatch.setattr(chaos, "judge", lambda scene, undisturbed: None)
    assert play(no_disk, tmp_path) is None
    assert "busy" in play(stuck, tmp_path)
    assert "no_disk was left out: must be superuser" in capsys.readouterr().out


def test_a_victim_that_has_ended_by_itself_means_that_the_job_is_killed(tmp_path, monkeypatch):
    class Gone:
        def kill(self):
            raise psutil.NoSuchProcess(1)

    training = StubTraining(tmp_path)
    training.workers = lambda: [Gone()]
    monkeypatch.setattr(strikes, "last_step", lambda run_dir: 4)
    fault = strikes.strike(Scene(run_dir=tmp_path, kinds=(WORKER,)), training, WORKER, DICE)
    assert fault.kind == JOB and training.killed
    training.workers = list
    training.members = lambda pool: []
    for kind in (ROLLOUT, REWARD):
        assert strikes.strike(Scene(run_dir=tmp_path, kinds=(kind,)), training, kind, DICE).kind == JOB
    assert strikes.strike(Scene(run_dir=tmp_path, kinds=(WORKER,)), training, WORKER, DICE).kind == JOB


def test_a_member_of_the_struck_pool_is_killed_and_no_other(tmp_path):
    killed = []
    training = StubTraining(tmp_path)
    training.workers = list
    training.members = lambda pool: [SimpleNamespace(kill=lambda: killed.append(pool))]
    for kind in (ROLLOUT, REWARD):
        assert strikes.strike(Scene(run_dir=tmp_path, kinds=(kind,)), training, kind, DICE).kind == kind
    assert killed == ["rollout pool", "reward pool"] and not training.killed


def test_an_alignment_is_judged_by_its_own_undisturbed_run(tmp_path, monkeypatch):
    scene = Scene(run_dir=tmp_path / "run", kinds=(ROLLOUT,), undisturbed=tmp_path / "undisturbed")
    states = {scene.run_dir: {"w": torch.ones(2)}, scene.undisturbed: {"w": torch.ones(2)}}
    lines = [{"step": step, "align/policy_version": version} for step, version in ((1, 4), (2, 9))]
    monkeypatch.setattr(chaos, "assert_everyone_was_seen_once", lambda run_dir, epochs: None)
    monkeypatch.setattr(chaos, "saved_state", states.get)
    monkeypatch.setattr(chaos, "metric_lines", lambda run_dir: lines)
    chaos.judge(scene, [])
    states[scene.undisturbed]["w"] = torch.zeros(2)
    with pytest.raises(AssertionError, match="w"):
        chaos.judge(scene, [])
    lines.append({"step": 3, "align/policy_version": 9})
    with pytest.raises(AssertionError, match="used twice"):
        chaos.judge(scene, [])
