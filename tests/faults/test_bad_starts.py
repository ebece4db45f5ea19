"""What a person meets who starts a run on hostile, damaged or absurd input: a message and an exit code."""

import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

from cluster.lease import Lease
from cluster.storage import Storage
from data_streams.manifest import Manifest
from launch.cli import run as grail
from tests.data_streams.tiny_data import damage
from tests.faults.training import ALONE, last_step, latest_step, pretrain_line, saved_state
from tests.tiny_run import build_tiny_data

SHORT = (*ALONE, "--train.epochs", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def one_epoch(data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    assert grail(pretrain_line(data, run_dir, *SHORT)) == 0
    return run_dir


@pytest.fixture(scope="module")
def damaged(data, tmp_path_factory):
    """The same shards with one byte flipped in a chunk of 16 users."""
    path = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(data, path)
    damage(path, Manifest.load(Storage(path)), 1)
    return str(path)


def test_resume_never_refuses_a_directory_with_checkpoints(data, one_epoch, capsys):
    assert grail(pretrain_line(data, one_epoch, "--resume", "never")) == 2
    assert f"--resume never needs a run directory without checkpoints, and {one_epoch} has some" in (
        capsys.readouterr().err
    )


def test_a_second_job_on_one_run_directory_is_refused_and_touches_nothing(data, one_epoch, capsys):
    before = {path: path.stat().st_mtime_ns for path in one_epoch.rglob("*") if path.is_file()}
    with Lease(str(one_epoch), print):
        assert grail(pretrain_line(data, one_epoch)) == 1
    assert f"grail: one job at a time may write to {one_epoch}" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in one_epoch.rglob("*") if path.is_file()} == before


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_pickles_among_the_checkpoints_do_not_run_and_the_run_goes_on(data, one_epoch, tmp_path):
    run_dir, marker = tmp_path / "run", tmp_path / "marker"
    shutil.copytree(one_epoch, run_dir)
    hostile = pickle.dumps(Hostile(marker))
    pickle.loads(hostile)
    assert marker.exists(), "the pickle must be one that works"
    marker.unlink()
    checkpoint = run_dir / "checkpoints" / f"step-{latest_step(run_dir):08d}"
    for folder in (run_dir, checkpoint.parent, checkpoint):
        for name in (".metadata", "state.pkl", "rank-00002.pt"):
            (folder / name).write_bytes(hostile)
    before = latest_step(run_dir)
    assert grail(pretrain_line(data, run_dir, *ALONE, "--train.epochs", "2")) == 0
    assert latest_step(run_dir) > before
    assert not marker.exists()


def test_a_damaged_shard_ends_the_run_with_the_name_of_its_chunk(damaged, tmp_path, capsys):
    assert grail(pretrain_line(damaged, tmp_path / "run", *ALONE, "--data.on-bad-shard", "fail")) == 1
    assert re.search(r"grail: chunk at bytes \d+.* of shard shards/.*checksum", capsys.readouterr().err)


def test_a_damaged_shard_is_skipped_and_logged_where_that_is_asked_for(damaged, tmp_path, capsys):
    line = pretrain_line(damaged, tmp_path / "run", "--data.on-bad-shard", "skip", *SHORT)
    assert grail(line) == 0
    assert re.search(r"Skipped 16 users of a bad chunk: chunk at bytes \d+", capsys.readouterr().err)


def test_divergence_ends_the_run_at_once_and_leaves_the_last_good_checkpoint(data, tmp_path, capsys):
    run_dir = tmp_path / "run"
    absurd = ("--train.learning-rate", "1e30", "--train.max-gradient-norm", "None")
    line = pretrain_line(data, run_dir, *absurd, "--train.checkpoint-every-steps", "1")
    assert grail(line) == 1
    output = capsys.readouterr().err
    assert re.search(r"grail: loss and gradients must be finite; at step \d+ they are not on .*rank", output)
    assert "restart" not in output
    assert 0 < latest_step(run_dir) <= last_step(run_dir)
    assert all(torch.isfinite(tensor.float()).all() for tensor in saved_state(run_dir).values())
