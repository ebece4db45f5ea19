"""Runs whose data and checkpoints lie in an object store: S3, and one that is slow, fails and hangs up."""

import os
import shutil
from pathlib import Path

import pytest

from cluster import retries
from cluster.errors import ClusterError, ConfigError, StorageError
from cluster.lease import Lease
from cluster.storage import Storage
from launch.cli import run as grail
from launch.run_status import report_run
from tests.faulty_store import FaultyStore
from tests.process_group import run_on_processes
from tests.tiny_run import NUM_USERS, assert_same_state, build_tiny_data, run, tiny_config
from trainer.audit import read_audit
from trainer.checkpoint_layout import committed_steps
from trainer.metric_log import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    config = tiny_config(data, tmp_path_factory.mktemp("undisturbed"), checkpoint_every_steps=3)
    (result, state), *_ = run_on_processes(run, 2, config)
    return result, state


@pytest.fixture(scope="module")
def s3(data) -> dict[str, str]:
    """The environment in which s3:// means a server on this machine, with a bucket that holds the data."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        bucket = Storage("s3://grail")
        bucket.make_directory()
        for path in Path(data).rglob("*"):
            if path.is_file():
                bucket.write(f"data/{path.relative_to(data)}", path.read_bytes())
        yield environment
    server.stop()


def run_in_s3(process, config, environment, stop_after=None):
    os.environ.update(environment)
    return run(process, config, stop_after)


def run_faulty(process, config, faults):
    FaultyStore.misbehave(**faults, seed=process.rank)
    retries.FIRST_PAUSE_S = 0.01
    outcome = run(process, config)
    return outcome, FaultyStore.failures


def check_whole(run_dir: str) -> None:
    for epoch, users in read_audit(Storage(run_dir)).items():
        assert sorted(users) == list(range(NUM_USERS)), f"epoch {epoch}"


def test_a_run_in_s3_is_stopped_and_goes_on_at_another_size_as_one_on_disk(s3, undisturbed, tmp_path):
    config = tiny_config("s3://grail/data", "s3://grail/run", checkpoint_every_steps=3)
    (first, _), *_ = run_on_processes(run_in_s3, 2, config, s3, 4)
    (second, state), *_ = run_on_processes(run_in_s3, 1, config, s3)
    expected, expected_state = undisturbed
    assert first["status"] == "stopped" and 0 < first["step"] < second["step"] == expected["step"]
    assert second["best"] == pytest.approx(expected["best"], abs=1e-3)
    assert_same_state(state, expected_state, tolerance=2e-5)
    check_whole(config.run_dir)
    steps = committed_steps(Storage("s3://grail/run/checkpoints"))
    assert len(steps) <= 3 and steps[-1] == second["step"], "older ones are removed there too"
    assert any("validation/ndcg@10" in line for line in read_metrics(config.run_dir))


def test_the_commands_work_on_a_run_in_s3(s3, capsys):
    run_dir = "s3://grail/commands"
    small = (
        "--cluster.workers 1 --cluster.in-process --model.width 16 --model.num-blocks 1 "
        "--data.num-streams 2 --train.max-steps 3"
    )
    line = ["pretrain", "sasrec", "--data.path", "s3://grail/data", "--run-dir", run_dir, *small.split()]
    assert grail(line) == 0
    report = report_run(run_dir)
    assert (report.state, report.checkpoint_step) == ("finished", 3)
    assert grail(["evaluate", run_dir]) == 0
    capsys.readouterr()
    assert grail(["status", "s3://grail"]) == 0
    assert f"{run_dir}  finished" in capsys.readouterr().out
    kept = {"config.yaml", "curves.png", "evaluation.json", "status.json", "plan.txt"}
    assert kept <= set(Storage(run_dir).list())


def test_one_job_at_a_time_writes_to_a_run_in_s3(s3):
    with Lease("s3://grail/leased", print), pytest.raises(ClusterError, match="one job at a time"):
        Lease("s3://grail/leased", print).__enter__()
    with Lease("s3://grail/leased", print):
        pass


def test_a_slow_store_that_fails_and_hangs_up_in_mid_write_changes_nothing(data, undisturbed, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    config = tiny_config(f"faulty://{tmp_path}/data", f"faulty://{tmp_path}/run", checkpoint_every_steps=3)
    faults = {"failure_rate": 0.1, "delay_s": 0.002, "breaks": 2}
    outcomes = run_on_processes(run_faulty, 2, config, faults)
    (result, state), _ = outcomes[0]
    assert min(failures for _, failures in outcomes) > 5, "there must have been faults"
    assert {**result, "best": pytest.approx(result["best"])} == undisturbed[0]
    assert_same_state(state, undisturbed[1], tolerance=0)
    check_whole(f"{tmp_path}/run")


def test_a_store_that_never_answers_ends_in_an_error_that_names_the_address(tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.001)
    FaultyStore.misbehave(failure_rate=1.0)
    try:
        with pytest.raises(
            StorageError, match=rf"exists of {tmp_path}/run/x must be answered, and failed 7 times.*hung up"
        ):
            Storage(f"faulty://{tmp_path}/run").exists("x")
    finally:
        FaultyStore.misbehave()


def test_an_error_that_lasts_is_not_asked_again(tmp_path):
    FaultyStore.misbehave()
    with pytest.raises(FileNotFoundError):
        Storage(f"faulty://{tmp_path}").read("missing")
    with pytest.raises(ConfigError, match=r"files at nowhere://x cannot be reached .*Protocol not known"):
        Storage("nowhere://x")


def test_what_a_store_does_not_allow_ends_the_command_with_the_address(tmp_path, monkeypatch, capsys):
    """As s3fs says it: an error without a number and without a path."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(FaultyStore, "exists", refuse)
    assert grail(["status", f"faulty://{tmp_path}/run"]) == 1
    shown = capsys.readouterr().err
    assert f"{tmp_path}/run/config.yaml must be allowed, and the store says: Access Denied" in shown


def test_a_creation_whose_answer_was_lost_counts_as_done(tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.001)
    storage = Storage(f"faulty://{tmp_path}")
    for attempt in range(20):
        FaultyStore.misbehave(failure_rate=0.5, seed=attempt)
        storage.create(f"file-{attempt}", b"mine")
    FaultyStore.misbehave()
    with pytest.raises(FileExistsError):
        storage.create("file-3", b"another's")
