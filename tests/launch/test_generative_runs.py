"""A run over semantic IDs as a person would type it: it recommends, and refuses tables that are not its own."""

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import IO

import numpy as np
import polars as pl
import pytest

from data_streams.item_table import ItemTable
from data_streams.semantic_ids import SemanticIdTable
from launch.cli import run as grail
from launch.jobs import _prm, _write_per_user
from launch.run_directory import load_config
from tests.tiny_run import NUM_ITEMS, build_tiny_data, save_semantic_ids

TINY = (
    "--cluster.workers 1 --cluster.in-process --model.width 16 --model.num-encoder-blocks 1 "
    "--model.num-decoder-blocks 1 --model.num-heads 2 --model.head-width 8 --model.feedforward-width 32 "
    "--data.num-streams 2 --train.max-steps 3 --train.precision fp32"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run, and the folder of its table."""
    folder = tmp_path_factory.mktemp("run")
    table = save_semantic_ids(data, folder / "ids")
    assert grail(pretrain_line(data, table, folder / "run")) == 0
    return folder / "run", table


def pretrain_line(data, table, run_dir, *options: str) -> list[str]:
    line = ["pretrain", "tiger-amazon", "--data.path", data, "--run-dir", str(run_dir)]
    return [*line, "--data.semantic-ids", str(table), *TINY, *options]


def test_only_items_of_an_allow_list_are_recommended(data, trained, tmp_path, capsys):
    run_dir, _ = trained
    (tmp_path / "allow.txt").write_text("i1\ni2\ni3\ni4\n")
    line = ["recommend", str(run_dir), "--search.method", "gumbel", "--users", "2"]
    line += ["--search.allow", str(tmp_path / "allow.txt")]
    assert grail([*line, "--evaluation.no-filter-seen"]) == 0
    shown = capsys.readouterr().out
    assert all(shown.count(f"Title {item} ") >= 2 for item in (1, 2, 3, 4))
    assert grail([*line[:2], "--search.width", str(NUM_ITEMS + 1)]) == 2
    assert f"must not exceed the {NUM_ITEMS} items of the catalogue" in capsys.readouterr().err


def test_items_that_do_not_meet_a_condition_are_filtered(trained, capsys):
    run_dir, _ = trained
    line = ["recommend", str(run_dir), "--users", "2", "--condition", "title=Title 7"]
    assert grail([*line, "--search.width", str(NUM_ITEMS), "--evaluation.no-filter-seen"]) == 0
    shown = [row for row in capsys.readouterr().out.splitlines() if re.search(r"Title \d+ .*-\d", row)]
    assert len(shown) == 2 and all("Title 7 " in row for row in shown), shown
    assert grail(line) == 2
    assert f"filtering looks at {NUM_ITEMS} items" in capsys.readouterr().err


def test_baselines_stand_beside_a_run_that_generates_unless_its_search_is_narrowed(trained, tmp_path, capsys):
    run_dir, _ = trained
    line = ["evaluate", str(run_dir), "--baselines", "--evaluation.bootstrap-resamples", "0"]
    assert grail(line) == 0
    assert "popularity" in capsys.readouterr().out
    content = json.loads((run_dir / "evaluation.json").read_text())
    assert "hrecall1@50" in content["metrics"] and "hrecall1@50" not in content["baselines"]["popularity"]
    (tmp_path / "deny.txt").write_text("i1\n")
    for narrowed in (["--search.deny", str(tmp_path / "deny.txt")], ["--evaluation.condition", "filter"]):
        assert grail([*line, *narrowed]) == 2
        error = capsys.readouterr().err
        assert f"{narrowed[0][2:]} would narrow the run's own search alone" in error


def test_metrics_by_user_are_written_whole_into_a_folder_that_is_made(
    data, trained, tmp_path, capsys, monkeypatch
):
    run_dir, _ = trained
    line = ["evaluate", str(run_dir), "--evaluation.bootstrap-resamples", "0", "--per-user"]
    assert grail([*line, str(tmp_path / "new" / "users.parquet")]) == 0
    users = pl.read_parquet(tmp_path / "new" / "users.parquet")
    content = json.loads((run_dir / "evaluation.json").read_text())
    assert users["user_row"].to_list() == list(range(content["num_users"]))
    assert users["user_id"].n_unique() == content["num_users"]
    assert users["mrr"].mean() == pytest.approx(content["metrics"]["mrr"])
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["users.parquet"]

    def breaks_off(_: pl.DataFrame, file: str | IO[bytes]) -> None:
        with open(file, "wb") if isinstance(file, str) else nullcontext(file) as opened:
            opened.write(b"PAR1")
        raise OSError("no space left")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", breaks_off)
    with pytest.raises(OSError, match="no space left"):
        _write_per_user(str(tmp_path / "broken.parquet"), data, [1], {"mrr": [0.5]})
    assert not list(tmp_path.glob("broken*"))


def test_metrics_by_user_that_cannot_be_written_are_refused_before_any_user_is_ranked(
    trained, tmp_path, capsys, monkeypatch
):
    run_dir, _ = trained
    monkeypatch.setattr("launch.jobs.evaluate_job", None)
    (tmp_path / "file").write_text("")
    line = ["evaluate", str(run_dir), "--per-user"]
    assert grail([*line, str(tmp_path)]) == 2
    assert "which is a folder; name a file in it" in capsys.readouterr().err
    assert grail([*line, str(tmp_path / "users.csv")]) == 2
    assert "--per-user must end in .parquet" in capsys.readouterr().err
    assert grail([*line, str(tmp_path / "file" / "users.parquet")]) == 2
    assert "--per-user must be a file that can be written" in capsys.readouterr().err


def test_a_model_refuses_another_table_when_it_resumes_and_when_it_is_evaluated(
    data, trained, tmp_path, capsys
):
    run_dir, table = trained
    kept = tmp_path / "kept"
    shutil.copytree(table, kept)
    try:
        save_semantic_ids(data, table, seed=1)
        assert grail(["evaluate", str(run_dir)]) == 1
        assert "the model was trained with the semantic IDs" in capsys.readouterr().err
        assert grail(pretrain_line(data, table, run_dir, "--train.max-steps", "5")) == 1
        assert "semantic_ids" in capsys.readouterr().err
    finally:
        shutil.copytree(kept, table, dirs_exist_ok=True)


def test_weights_that_have_learnt_other_semantic_ids_are_told_of(data, trained, tmp_path, capsys):
    run_dir, table = trained
    other = save_semantic_ids(data, tmp_path / "other", seed=1)
    for number, (ids, is_told) in enumerate(((table, False), (other, True))):
        begun = ["--init-from", str(run_dir), "--train.max-steps", "1"]
        assert grail(pretrain_line(data, ids, tmp_path / f"run-{number}", *begun)) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert ("The weights have learnt the semantic IDs" in said) == is_told


def test_a_run_serves_a_larger_catalogue_by_the_extended_table_unless_it_has_rows_of_items(
    data, trained, tmp_path, capsys
):
    run_dir, table = trained
    larger, extended = build_tiny_data(tmp_path, extra_items=4), str(tmp_path / "extended")
    new_codes = np.array([[9, code] for code in range(4)], dtype=np.int32)
    SemanticIdTable.load(table).extended(ItemTable.load(larger).item_ids, new_codes).save(extended)
    served = ["--data.path", larger, "--data.semantic-ids", extended]
    line = ["recommend", "--users", "1", "--k", str(NUM_ITEMS + 4), "--search.width", str(NUM_ITEMS + 4)]
    assert grail([line[0], str(run_dir), *line[1:], "--evaluation.no-filter-seen", *served]) == 0
    assert f"Title {NUM_ITEMS + 3} " in capsys.readouterr().out
    tiny = [*TINY[:5], *TINY[9:11], *TINY[13:], "--model.num-blocks", "1", "--model.num-depth-blocks", "1"]
    run_with_rows = str(tmp_path / "decoder")
    of_data = ["--data.path", data, "--data.semantic-ids", str(table), "--run-dir", run_with_rows]
    assert grail(["pretrain", "decoder-amazon", *of_data, *tiny]) == 0
    assert grail([line[0], run_with_rows, *line[1:], *served]) == 1
    assert f"must have {NUM_ITEMS + 4} rows for the catalogue at hand" in capsys.readouterr().err


def test_a_table_of_another_catalogue_is_refused(data, tmp_path, capsys):
    other = build_tiny_data(tmp_path, first_item=1000)
    line = pretrain_line(data, save_semantic_ids(other, tmp_path / "ids"), tmp_path / "run")
    assert grail(line) == 1
    assert f"must have the {NUM_ITEMS} items of the data set" in capsys.readouterr().err
    assert grail(pretrain_line(data, tmp_path / "nothing", tmp_path / "run")) == 1
    assert "must hold semantic IDs, and there is no semantic_ids.json" in capsys.readouterr().err


def test_searches_are_compared_without_baselines_and_users(trained, tmp_path, capsys):
    run_dir, _ = trained
    line = ["evaluate", str(run_dir), "--search.prm", "--search.candidates", "50", "100"]
    assert grail([*line, "--per-user", str(tmp_path / "users.parquet")]) == 2
    assert "without --baselines and --per-user" in capsys.readouterr().err
    assert grail([*line, "--evaluation.condition", "filter"]) == 2
    assert "or --evaluation.condition none" in capsys.readouterr().err
    assert grail([*line[:3], "--beside", str(run_dir)]) == 2
    assert "table of several --search.candidates" in capsys.readouterr().err
    assert grail([*line, "--beside", str(tmp_path)]) == 1
    assert "must be a run directory" in capsys.readouterr().err


def test_searches_are_refused_before_the_first_of_them_is_measured(trained, capsys, monkeypatch):
    run_dir, _ = trained
    monkeypatch.setattr("trainer.search_scaling._measure", lambda *_: pytest.fail("it is measured"))
    line = ["evaluate", str(run_dir), "--search.prm", "--search.candidates", "50", str(NUM_ITEMS)]
    for options in ([], ["--beside", str(run_dir)]):
        assert grail([*line, *options]) == 2
        assert "--search.prm needs a process reward model, and the Tiger" in capsys.readouterr().err


def test_all_ranks_steer_by_one_step_of_a_run_that_goes_on_meanwhile(trained, monkeypatch):
    """What another rank finds best, when it looks later, does not count."""
    config = load_config(str(trained[0]))
    steered = replace(config, search=replace(config.search, prm=True, prm_run=config.run_dir))
    monkeypatch.setattr("launch.served_run.find_step", lambda *_: 300)
    monkeypatch.setattr("trainer.assembly.agree_on", lambda number, process: number - 100)
    monkeypatch.setattr("launch.jobs._load", lambda process, config, step: step)
    assert _prm(SimpleNamespace(config=steered, process="rank 1")) == 200
