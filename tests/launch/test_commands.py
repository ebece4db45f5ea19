"""The commands of a first day, on a tiny world and two workers, as a person would type them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
from safetensors.torch import load_file

from cluster.errors import DataError
from cluster.packages import root
from launch import cli
from launch.jobs import user_ids, user_rows
from tests.faults.training import ALONE

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(root()), "OMP_NUM_THREADS": "1"}
WORLD = "--num-users 300 --num-items 200 --num-clusters 8 --mean-clicks 12"
LONG = "--train.epochs 100000 --train.patience None --train.checkpoint-every-s None --log.every-steps 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


def grail(folder, line: str, timeout_s: float = 120) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *line.split()],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def run_dir(folder):
    """A run of two workers, stopped by a SIGTERM to its whole process group, that went on to its end in one process."""
    grail(folder, f"data build world {WORLD} --out shards")
    start = f"pretrain sasrec --data.path shards --run-dir run --cluster.workers 2 --model.width 16 {LONG}"
    # A shell leads the group, as `make` or `timeout` does, and lives on to tell the exit code.
    script = f"trap : TERM; {sys.executable} -m launch.cli {start} & wait $!; wait $!; exit $?"
    shell = subprocess.Popen(
        ["sh", "-c", script],
        cwd=folder,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _wait_for_lines(folder / "run" / "metrics.jsonl", 3, shell)
    os.killpg(shell.pid, signal.SIGTERM)
    _, error = shell.communicate(timeout=60)
    assert shell.returncode == 75, error
    assert "Stopped at step" in error and "Go on with: grail pretrain" in error
    alone = " ".join(ALONE)
    resumed = grail(folder, f"pretrain run/config.yaml --train.epochs 4 --train.warmup-steps 5 {alone}")
    assert "Going on from step" in resumed.stderr
    return folder / "run"


def _wait_for_lines(path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def test_a_stopped_run_goes_on_where_it_stopped(run_dir):
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    for name in ("config.yaml", "plan.txt", "curves.png", "audit", "checkpoints/LATEST", "logs/rank-1.log"):
        assert (run_dir / name).exists(), name


@pytest.fixture
def command(folder, run_dir, monkeypatch, capsys):
    """Runs a command in this process, which keeps Ray and the imports warm; returns what it prints."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("launch.progress.start_driver_logs", lambda *_: None)

    def run(line: str) -> str:
        assert cli.run(line.split()) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def test_evaluation_is_printed_and_written(run_dir, command):
    printed = command("evaluate run --cluster.no-in-process --baselines")
    content = json.loads((run_dir / "evaluation.json").read_text())
    assert content["split"] == "test" and content["seen_filtered"] is True and content["num_users"] == 300
    assert {"recall@5", "ndcg@5", "recall@10", "ndcg@10"} <= content["metrics"].keys()
    assert content["baselines"]["oracle"]["ndcg@10"] > content["metrics"]["ndcg@10"] > 0
    assert f"{content['metrics']['recall@10']:.4f}" in printed and "seen items left out" in printed


def test_recommendations_are_shown_with_titles_and_written_for_everybody(folder, command):
    shown = command("recommend run --users 2 --k 3")
    assert shown.count("latest history, oldest first") == 2
    first, second = re.findall(r"user (\S+), \d+ events", shown)
    named = command(f"recommend run --user-ids {second} {first} --k 3")
    assert re.findall(r"user (\S+), \d+ events", named) == [second, first]
    command(f"recommend run --user-ids {second} --out one.parquet --k 3")
    assert pl.read_parquet(folder / "one.parquet")["user_id"].cast(str).to_list() == [second] * 3
    command("recommend run --all --out all.parquet --k 3 --cluster.workers 2 --cluster.no-in-process")
    table = pl.read_parquet(folder / "all.parquet")
    assert table.columns == ["user_id", "rank", "item_id", "title", "score"]
    assert table["user_id"].n_unique() == 300 and table.height == 900
    assert table["title"].null_count() == 0 and table["title"][0] in shown
    assert not list(folder.glob("all.parquet.*"))


def test_unknown_users_and_contradictions_are_refused(command, capsys):
    for line, told in (
        ("--user-ids nobody", "it has no nobody"),
        ("--user-ids nobody --all --out x.parquet", "give one of them"),
        ("--all --users 4 --out x.parquet", "--users is how many of the first users are shown"),
        ("--all", "--all needs --out"),
        ("--out x.parquet", "--out is for --all or --user-ids"),
        ("--all --out x.csv", "--out must end in .parquet, as that is what is written; got x.csv"),
    ):
        assert cli.run(["recommend", "run", *line.split()]) != 0
        assert told in " ".join(capsys.readouterr().err.split())


def test_users_without_a_table_of_ids_are_named_by_their_rows(folder, run_dir):
    path = str(folder / "shards")
    assert user_rows(path, [str(user_ids(path)[3])]) == [3]
    bare = folder / "bare"
    shutil.copytree(folder / "shards", bare, ignore=shutil.ignore_patterns("users.parquet"))
    assert user_rows(str(bare), ["7", "299"]) == [7, 299]
    for name in ("300", "²", "-1", "u7"):
        with pytest.raises(DataError, match=f"it has no {name}"):
            user_rows(str(bare), [name])


def test_a_checkpoint_can_be_looked_at_and_taken_out(folder, command):
    assert "table/item" in command("checkpoint inspect run")
    command("checkpoint export run --out exported")
    assert "positions.weight" in load_file(folder / "exported" / "model.safetensors")
    table = pl.read_parquet(folder / "exported" / "item.parquet")
    assert table.columns == ["row", "item_id", "vector"] and table.height == 200
