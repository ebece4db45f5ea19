"""A run in the command's own process, on a machine that has none of the distributed libraries."""

import json
import os
import subprocess
import sys

import pytest

from cluster.configuration import ClusterConfig
from cluster.errors import ConfigError
from cluster.packages import root
from cluster.reporter import StopSignal
from cluster.workers import run_workers
from tests.blocked_imports import without

WORLD = "--num-users 300 --num-items 200 --num-clusters 8 --mean-clicks 12"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(root()), "OMP_NUM_THREADS": "1"}
WITHOUT = ("ray", "deepspeed", "torchrec", "fbgemm_gpu", "wandb")
BLOCKED = f"""{without(WITHOUT)}
from launch.cli import run
sys.exit(max(run(line.split()) for line in sys.argv[1:]))
"""


def grail(folder, *lines: str, blocked: bool, fails: bool = False) -> str:
    how = ["-c", BLOCKED, *lines] if blocked else ["-m", "launch.cli", *lines[0].split()]
    done = subprocess.run(
        [sys.executable, *how],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def metrics_of(run_dir) -> dict[str, float]:
    return json.loads((run_dir / "evaluation.json").read_text())["metrics"]


def test_a_run_in_process_is_evaluated_there_and_by_a_gang(tmp_path):
    options = "--model.width 16 --train.epochs 2 --cluster.workers 1 --cluster.in-process"
    build = f"data build world {WORLD} --out shards"
    train = f"pretrain sasrec --data.path shards --run-dir run {options}"
    assert "Finished at step" in grail(tmp_path, build, train, "evaluate run", blocked=True)
    assert "whole" in (tmp_path / "run" / "plan.txt").read_text()
    alone = metrics_of(tmp_path / "run")
    grail(tmp_path, "evaluate run --cluster.no-in-process --cluster.workers 2", blocked=False)
    assert metrics_of(tmp_path / "run") == pytest.approx(alone, abs=1e-4)
    written = (tmp_path / "run" / "config.yaml").read_text()
    refused = grail(tmp_path, f"{train} --model.width 32", blocked=False, fails=True)
    assert "model.width: 16 saved, 32 now" in refused
    assert (tmp_path / "run" / "config.yaml").read_text() == written


def test_a_run_refuses_another_order_of_users_and_stays_as_it_was(tmp_path):
    grail(tmp_path, f"data build world {WORLD} --out shards", blocked=False)
    train = "pretrain sasrec --data.path shards --run-dir run --cluster.workers 1 --cluster.in-process"
    train += " --model.width 16 --train.max-steps"
    grail(tmp_path, f"{train} 1", blocked=False)
    before = (tmp_path / "run" / "config.yaml").read_text()
    refused = grail(tmp_path, f"{train} 2 --data.num-streams 4", blocked=False, fails=True)
    assert "another order of users: data.num_streams was 8, is 4" in refused
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    assert "Finished at step 2" in grail(tmp_path, f"{train} 2", blocked=False)


def test_a_process_is_one_worker():
    with pytest.raises(
        ConfigError, match=r"has one worker, and cluster.workers is 2; give --cluster.workers 1"
    ):
        run_workers(print, config=ClusterConfig(workers=2, in_process=True), run_dir="")


def test_events_and_stops_pass_directly(tmp_path):
    stop, heard = StopSignal(), []

    def work(process, reporter):
        assert process.world_size == 1 and not reporter.stop_requested()
        reporter.saved(3)
        stop.request()
        assert reporter.stop_requested()
        stop.abort(ConfigError("the lease was lost"))
        reporter.stop_requested()

    config = ClusterConfig(in_process=True)
    with pytest.raises(ConfigError, match="the lease was lost"):
        run_workers(work, config=config, run_dir=str(tmp_path), on_event=heard.append, stop=stop)
    assert [event.kind for event in heard] == ["started", "saved"]
