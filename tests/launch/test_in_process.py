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

WORLD = "--num-users 300 --num-items 200 --num-clusters 8 --mean-clicks 12"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(root()), "OMP_NUM_THREADS": "1"}
WITHOUT = ("ray", "deepspeed", "torchrec", "fbgemm_gpu", "wandb")
BLOCKED = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {WITHOUT}:
            raise ImportError(name + " is not there on small machines")
sys.meta_path.insert(0, Blocked())
from launch.cli import main
main()
"""


def grail(folder, line: str, *, blocked: bool) -> str:
    how = ["-c", BLOCKED] if blocked else ["-m", "launch.cli"]
    done = subprocess.run(
        [sys.executable, *how, *line.split()],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics_of(run_dir) -> dict[str, float]:
    return json.loads((run_dir / "evaluation.json").read_text())["metrics"]


def test_a_run_in_process_is_evaluated_and_goes_on_in_a_gang(tmp_path):
    grail(tmp_path, f"data build world {WORLD} --out shards", blocked=True)
    options = "--model.width 16 --train.epochs 2 --cluster.workers 1 --cluster.in-process"
    out = grail(tmp_path, f"pretrain sasrec --data.path shards --run-dir run {options}", blocked=True)
    assert "Finished at step" in out and "whole" in (tmp_path / "run" / "plan.txt").read_text()
    grail(tmp_path, "evaluate run", blocked=True)
    alone = metrics_of(tmp_path / "run")
    grail(tmp_path, "evaluate run --cluster.no-in-process --cluster.workers 2", blocked=False)
    assert metrics_of(tmp_path / "run") == pytest.approx(alone, abs=1e-4)
    further = "--cluster.no-in-process --cluster.workers 2 --train.epochs 3"
    grail(tmp_path, f"pretrain run/config.yaml {further}", blocked=False)
    assert "Going on from step" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()


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
