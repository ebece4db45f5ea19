"""The loop: what it logs, when it validates, saves and ends."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from cluster.storage import Storage
from data_streams.build import BuildConfig, build
from data_streams.sources.events import EventsSource
from tests.process_group import ALONE, run_on_processes
from tests.tiny_run import NUM_USERS, build_tiny_data, run, tiny_config, write_events
from trainer.audit import read_audit
from trainer.checkpoint_layout import best_step, committed_steps
from trainer.job import Job
from trainer.metric_log import read_metrics
from trainer.pretrain import _profiled
from trainer.run_state import Progress


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_tiny_data(tmp_path_factory.mktemp("data"))


def test_a_run_learns_logs_and_keeps_its_best_and_last_checkpoints(data, tmp_path):
    config = tiny_config(
        data, tmp_path / "run", epochs=6, checkpoint_every_steps=5, keep_last=1, learning_rate=1e-2
    )
    config = replace(config, profile=True, log=replace(config.log, every_steps=5))
    (result, _), _ = run_on_processes(run, 2, config)
    storage = Storage(config.run_dir)
    checkpoints = storage.folder("checkpoints")
    assert result["status"] == "finished" and result["epoch"] == 6
    assert best_step(checkpoints) == result["best_step"]
    assert set(committed_steps(checkpoints)) == {result["best_step"], result["step"]}
    lines = read_metrics(config.run_dir)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    validations = [line["validation/ndcg@10"] for line in lines if "validation/ndcg@10" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert len(validations) == 6 and max(validations) == pytest.approx(result["best"])
    assert {"data/wait_share", "train/targets_per_s", "train/learning_rate"} <= set(lines[0])
    per_target = lines[0]["train/gigaflops_per_target"]
    assert lines[0]["train/gigaflops_per_s"] == pytest.approx(per_target * lines[0]["train/targets_per_s"])
    assert storage.list("profile") == [f"step-{step:08d}.json" for step in range(10, 15)]
    assert b"traceEvents" in storage.read("profile/step-00000012.json")
    audit = read_audit(storage)
    assert sorted(audit) == list(range(6))
    assert all(sorted(users) == list(range(NUM_USERS)) for users in audit.values())
    assert "row_wise" in storage.read("plan.txt").decode()


def test_patience_ends_a_run_that_no_longer_improves(data, tmp_path):
    config = tiny_config(
        data, tmp_path / "run", epochs=50, patience=1, learning_rate=0.0, table_learning_rate=0.0
    )
    ((result, _),) = run_on_processes(run, 1, config)
    assert (result["status"], result["epoch"]) == ("finished", 3)
    assert result["best_step"] < result["step"]


def test_the_last_step_is_validated_when_it_ends_an_epoch_early(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", max_steps=4)
    ((result, _),) = run_on_processes(run, 1, config)
    assert (result["step"], result["best_step"], result["epoch"]) == (4, 4, 0)


def test_the_last_steps_are_written_where_they_are_too_few_for_a_line(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", max_steps=8)
    config = replace(config, log=replace(config.log, every_steps=5))
    run_on_processes(run, 2, config)
    lines = {line["step"]: line for line in read_metrics(config.run_dir) if "train/loss" in line}
    assert list(lines) == [5, 8]
    assert lines[8]["train/targets_per_step"] > 1 and 0 < lines[8]["train/loss"] < lines[5]["train/loss"]


def test_the_last_steps_are_told_of_as_those_of_the_last_epoch(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", epochs=2)
    config = replace(config, log=replace(config.log, every_steps=1000))
    ((result, _),) = run_on_processes(run, 1, config)
    lines = [line for line in read_metrics(config.run_dir) if "train/loss" in line]
    assert [(line["step"], line["train/epoch"]) for line in lines] == [(result["step"], 1)]


def test_validation_every_few_steps(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", epochs=1, validate_every_steps=3)
    ((result, _),) = run_on_processes(run, 1, config)
    steps = [line["step"] for line in read_metrics(config.run_dir) if "validation/mrr" in line]
    assert steps == list(range(3, result["step"] + 1, 3))


def test_without_anybody_held_out_for_validation_the_last_step_is_the_best(tmp_path):
    events, items = write_events(tmp_path / "raw")
    source = EventsSource.Config(events=(str(events),), items=str(items), timestamp_column="pos")
    moments = {"valid_from_s": 10**6, "test_from_s": 2 * 10**6}
    build(source, BuildConfig(out=str(tmp_path / "shards"), split="by-time", ray="never", **moments))
    config = tiny_config(str(tmp_path / "shards"), tmp_path / "run", epochs=2, patience=0)
    (result, _), _ = run_on_processes(run, 2, config)
    assert (result["status"], result["epoch"], result["best"]) == ("finished", 2, None)
    assert best_step(Storage(config.run_dir).folder("checkpoints")) == result["step"]


def test_a_checkpoint_that_is_due_by_time_is_saved_once(data, tmp_path):
    """Steps are agreed upon while the one before is computed, when its checkpoint is not there yet."""
    config = tiny_config(data, tmp_path / "run", checkpoint_every_s=0.0, keep_last=1000, epochs=1)
    run_on_processes(run, 2, config)
    *steps, _ = sorted(committed_steps(Storage(config.run_dir).folder("checkpoints")))
    assert len(steps) > 2
    assert min(after - before for before, after in pairwise(steps)) > 1


def test_traces_go_to_a_run_directory_at_an_address_too():
    storage = Storage("memory://traced")
    job = object.__new__(Job)
    vars(job).update(
        config=SimpleNamespace(profile=True), process=ALONE, progress=Progress(step=12), storage=storage
    )
    with _profiled(job):
        torch.ones(2).sum()
    assert storage.list("profile") == ["step-00000012.json"]
    assert b"traceEvents" in storage.read("profile/step-00000012.json")
