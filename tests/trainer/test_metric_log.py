import json
import sys

import pytest

from cluster.errors import ConfigError
from cluster.storage import Storage
from trainer import metric_log
from trainer.configuration import LogConfig
from trainer.metric_log import MetricLog, read_metrics


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_resumed_run_takes_out_the_lines_of_what_it_will_do_again(tmp_path, kind):
    run_dir = str(tmp_path) if kind == "local" else f"memory://{tmp_path}"
    log = MetricLog(run_dir, LogConfig(), {})
    for step in (10, 20):
        log.write(step, {"train/loss": 1.0 / step})
    saved = log.num_lines
    log.write(20, {"validation/mrr": 0.5})
    log.write(30, {"train/loss": 1.0 / 30})
    log.close()
    resumed = MetricLog(run_dir, LogConfig(), {}, resume_lines=saved)
    resumed.write(30, {"train/loss": 7.0})
    assert resumed.num_lines == 3
    resumed.close()
    lines = read_metrics(run_dir)
    assert [(line["step"], line["train/loss"]) for line in lines] == [(10, 0.1), (20, 0.05), (30, 7.0)]


def test_lines_that_a_checkpoint_counts_are_in_the_object_store_before_it(tmp_path):
    run_dir = f"memory://{tmp_path}"
    log = MetricLog(run_dir, LogConfig(), {})
    log.write(10, {"train/loss": 0.5})
    log.flush()
    saved = log.num_lines
    log.write(20, {"train/loss": 0.4})
    # Killed here; and so is the next one, before it has saved.
    for _ in range(2):
        resumed = MetricLog(run_dir, LogConfig(), {}, resume_lines=saved)
        resumed.write(20, {"train/loss": 0.4})
        resumed.flush()
    assert [line["step"] for line in read_metrics(run_dir)] == [10, 20]


def test_the_longer_an_object_store_takes_the_more_rarely_all_lines_are_sent(tmp_path, monkeypatch):
    clock, sent = [0.0], []
    monkeypatch.setattr(metric_log.time, "monotonic", lambda: clock[0])
    log = MetricLog(f"memory://{tmp_path}", LogConfig(), {})

    def write(storage: Storage, name: str, data: bytes) -> None:
        sent.append(clock[0])
        clock[0] += 2.0

    monkeypatch.setattr(Storage, "write", write)
    for step in range(60):
        log.write(step, {"train/loss": 0.5})
        clock[0] += 10.0
    assert sent == [40.0, 252.0, 464.0]


def test_a_line_is_there_as_soon_as_it_is_written_and_a_torn_one_is_dropped(tmp_path):
    log = MetricLog(str(tmp_path), LogConfig(), {})
    log.write(1, {"train/loss": 2.0})
    assert read_metrics(str(tmp_path))[0]["train/loss"] == 2.0
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "tra')
    MetricLog(str(tmp_path), LogConfig(), {}, resume_lines=5).close()
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [1]


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path):
    config = LogConfig(wandb="offline")
    for resume_lines in (0, 1):
        log = MetricLog(str(tmp_path), config, {"seed": 3}, resume_lines=resume_lines)
        log.write(resume_lines + 1, {"train/loss": 1.0})
        log.close()
    run_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert folders and all(folder.name.endswith(run_id) for folder in folders)


def test_wandb_that_nobody_is_logged_in_to_is_told_in_one_line(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        ConfigError, match=r"^--log.wandb online must .* configured. Use `wandb login` to log in; .*offline"
    ):
        MetricLog(str(tmp_path), LogConfig(wandb="online"), {})


def test_wandb_that_is_not_installed_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"--log.wandb offline needs the package wandb.*--log.wandb off"):
        MetricLog(str(tmp_path), LogConfig(wandb="offline"), {})
