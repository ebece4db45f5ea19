import json
import os
import re
import signal
import time

import pytest

from cluster.errors import CheckpointError, ConfigError, LeaseLostError
from cluster.lease import LEASE_NAME, Lease
from cluster.reporter import Event
from cluster.storage import Storage
from launch.cli import run as grail
from launch.commands.pretrain import STOPPED, train
from launch.run_status import StatusKeeper, read_status, report_run
from tests.tiny_run import build_tiny_data, tiny_config
from trainer.checkpoint_pointers import LATEST, write_pointer

PROGRESS = {
    "step": 30,
    "total_steps": 90,
    "epoch": 1,
    "epochs": 3,
    "loss": 2.5,
    "tokens_per_s": 12345.6,
    "step_s": 0.2,
}


@pytest.fixture
def run_dir(tmp_path) -> str:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "config.yaml").write_text("recipe: sasrec\n")
    return str(tmp_path / "runs" / "one")


def train_a_little(keeper: StatusKeeper) -> None:
    for rank, host in ((0, "10.0.0.1"), (1, "10.0.0.2")):
        values = {"pid": 7, "host": host, "restarts": 1, "workers": 2}
        keeper.on_event(Event(kind="started", rank=rank, values=values))
    keeper.on_event(Event(kind="progress", rank=0, values=PROGRESS))
    keeper.on_event(Event(kind="saved", rank=0, values={"step": 30}))
    write_pointer(Storage(keeper._run_dir).folder("checkpoints"), LATEST, 30)


def test_a_job_that_has_lost_the_run_says_nothing_of_it_any_more(run_dir):
    with pytest.raises(LeaseLostError), StatusKeeper(run_dir, "sasrec"):
        other = StatusKeeper(run_dir, "hstu")
        other.__enter__()
        raise LeaseLostError("another job writes to it")
    status = read_status(Storage(run_dir))
    assert (status.state, status.recipe) == ("running", "hstu")


def test_a_run_is_seen_while_it_works_and_after_its_end(run_dir, capsys):
    with Lease(run_dir, print), StatusKeeper(run_dir, "sasrec") as keeper:
        train_a_little(keeper)
        keeper._write()
        report = report_run(run_dir)
        assert (report.state, report.status.workers, report.status.hosts) == ("running", 2, 2)
        assert (report.checkpoint_step, report.status.step, report.status.restarts) == (30, 30, 1)
        keeper.end("finished")
    assert report_run(run_dir).state == "finished"
    assert grail(["status", os.path.dirname(run_dir)]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["run", "state", "progress"]
    assert line.startswith(f"{run_dir}  finished  step 30/90, epoch 1/3  2 on 2 host(s)  1 ")
    assert re.search(r"step 30, \d s ago +\d s ago$", line)
    assert grail(["status", run_dir, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"]["loss"] == 2.5


def test_what_a_short_run_never_told_is_left_out_of_its_progress(run_dir, capsys):
    with Lease(run_dir, print), StatusKeeper(run_dir, "sasrec") as keeper:
        keeper.on_event(Event(kind="saved", rank=0, values={"step": 4}))
        keeper.end("finished")
    assert grail(["status", run_dir]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(f"{run_dir}  finished  step 4 ") and "None" not in line


def test_the_numbers_of_a_run_that_goes_on_are_those_its_last_holder_left(run_dir):
    late = StatusKeeper(run_dir, "sasrec")
    with StatusKeeper(run_dir, "sasrec") as first:
        first.status.step = 7
    with late:
        assert late.status.step == 7


def test_an_error_is_kept_and_an_interruption_is_a_stop(run_dir):
    with pytest.raises(ValueError, match="too small"), StatusKeeper(run_dir, "sasrec"):
        raise ValueError("too small\nand more")
    assert (report_run(run_dir).state, report_run(run_dir).status.error) == ("failed", "too small")
    with StatusKeeper(run_dir, "sasrec"):
        assert read_status(Storage(run_dir)).error == ""
    assert report_run(run_dir).state == "stopped"


def test_a_refused_command_leaves_a_run_as_it_was(run_dir):
    with StatusKeeper(run_dir, "sasrec") as keeper:
        train_a_little(keeper)
        keeper.end("finished")
    with pytest.raises(ConfigError, match="its seed"), StatusKeeper(run_dir, "sasrec"):
        raise ConfigError("a run that goes on must keep its seed")
    assert (report_run(run_dir).state, report_run(run_dir).status.error) == ("finished", "")
    with pytest.raises(CheckpointError), StatusKeeper(run_dir, "sasrec") as keeper:
        keeper.on_event(Event(kind="begun", rank=0, values={"step": 30}))
        raise CheckpointError("these differ:\n  the width\n  the depth")
    assert (report_run(run_dir).state, report_run(run_dir).status.error) == (
        "failed",
        "these differ: the width",
    )


def test_a_job_that_is_gone_without_a_word_is_lost_and_one_far_away_is_silent_in_time(run_dir, monkeypatch):
    keeper = StatusKeeper(run_dir, "sasrec").__enter__()
    assert report_run(run_dir).state == "lost", "no lease"
    Storage(run_dir).write(LEASE_NAME, json.dumps({"machine": "far", "token": "x"}).encode())
    assert report_run(run_dir).state == "running"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 500)
    report = report_run(run_dir)
    assert report.state == "silent" and 400 < report.age_s < 600
    assert keeper.status.state == "running"


def test_a_folder_without_runs_is_refused_and_a_run_that_never_started_is_new(run_dir, tmp_path, capsys):
    assert report_run(run_dir).state == "new"
    assert grail(["status", str(tmp_path)]) == 2
    assert "holds no config.yaml at its top or one level below" in capsys.readouterr().err


def test_the_numbers_are_written_as_prometheus_reads_them(run_dir, tmp_path):
    path = tmp_path / "grail.prom"
    with StatusKeeper(run_dir, "sasrec", str(path)) as keeper:
        train_a_little(keeper)
    lines = path.read_text().splitlines()
    sample = re.compile(r'[a-z_]+\{run="[^"]+"(,state="[a-z]+")?\} -?[0-9.e+-]+')
    for line in lines:
        assert re.fullmatch(r"# (HELP [a-z_]+ .+|TYPE [a-z_]+ gauge)", line) or sample.fullmatch(line), line
    assert f'grail_train_loss{{run="{run_dir}"}} 2.5' in lines
    assert f'grail_workers{{run="{run_dir}"}} 2' in lines
    assert f'grail_state{{run="{run_dir}",state="stopped"}} 1' in lines
    assert f'grail_state{{run="{run_dir}",state="running"}} 0' in lines
    assert not list(tmp_path.glob("*.tmp"))


def test_a_status_that_cannot_be_written_does_not_end_the_run(run_dir, caplog):
    with StatusKeeper(run_dir, "sasrec", "/nowhere/at/all.prom"):
        pass
    assert "the status of the run could not be written" in caplog.text


def test_sigterm_before_ray_runs_ends_with_the_code_of_a_stop(tmp_path, monkeypatch):
    config = tiny_config(build_tiny_data(tmp_path / "data"), tmp_path / "run")
    monkeypatch.setattr("cluster.worker_group.start_ray", lambda config: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert train(config) == STOPPED
    assert signal.getsignal(signal.SIGTERM) == before
