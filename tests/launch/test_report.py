"""The page of a run: what it holds, and that nothing a run says becomes a part of the page."""

import json
import re

import pytest

from cluster.storage import Storage
from launch.cli import run as grail
from launch.commands.pretrain import parse_config
from launch.config_document import to_document
from launch.report import changed_from_recipe, write_report
from launch.report_page import Section, render_page
from launch.run_directory import ALIGNMENT, CONFIG, CURVES, EVALUATION, write_document
from launch.run_status import STATUS_NAME, Status


@pytest.fixture
def run_dir(tmp_path) -> str:
    path = str(tmp_path / "mine")
    words = ["--data.path", "<shards>", "--model.width", "32", "--objective", "bce", "--run-dir", path]
    write_document(path, CONFIG, to_document(parse_config("sasrec", words)))
    return path


def test_a_page_needs_nothing_else_and_escapes_what_it_shows():
    page = render_page(
        "<b>", [Section(title="A", rows=[("x", "1 < 2")], pictures=[b"\x89PNG"]), Section(title="Empty")]
    ).decode()
    assert "<h1>&lt;b&gt;</h1>" in page and "1 &lt; 2" in page
    assert 'src="data:image/png;base64,iVBORw=="' in page and "Empty" not in page
    assert not re.search(r"<script|<link|https?://", page)


def test_what_differs_from_the_recipe_is_told(run_dir):
    config = parse_config("sasrec", ["--data.path", "/x", "--model.width", "32", "--objective", "bce"])
    changed = {option: (before, here) for option, before, here in changed_from_recipe(to_document(config))}
    assert changed["model.width"] == ("64", "32") and changed["data.path"] == ("", "/x")
    assert changed["objective.type"][1] == "models.objectives.bce.BinaryCrossEntropy.Config"
    assert not {"run-dir", "recipe", "model.num-blocks"} & set(changed)
    assert changed_from_recipe({"recipe": "forgotten", "seed": 1}) == []


def test_a_run_that_has_only_begun_has_a_page(run_dir):
    page = open(write_report(run_dir)).read()
    assert "<h1>mine: sasrec</h1>" in page and "&lt;shards&gt;" in page and "<td>new</td>" in page
    for title in ("Evaluation", "Curves", "Alignment", "Where the table rows lie"):
        assert f"<h2>{title}" not in page


def test_a_page_shows_evaluation_baselines_alignment_and_pictures(run_dir):
    storage = Storage(run_dir)
    evaluation = {
        "split": "test", "num_users": 1234, "seen_filtered": True, "step": 7,
        "metrics": {"ndcg@10": 0.25, "coverage@10": 0.5}, "intervals": {"ndcg@10": [0.2, 0.3]},
        "baselines": {"popularity": {"ndcg@10": 0.125}},
        "slices": {"0": {"num_users": 34, "ndcg@10": 0.0}, "1 to 5": {"num_users": 1200, "ndcg@10": 0.375}},
    }  # fmt: skip
    shown = {"start": {"ndcg@10": 0.5}, "best (3)": {"ndcg@10": 0.625, "recall@5": 0.75}}
    storage.write(EVALUATION, json.dumps(evaluation).encode())
    storage.write(ALIGNMENT, json.dumps({"shown": shown}).encode())
    storage.write(CURVES, b"picture")
    storage.write(STATUS_NAME, json.dumps({**vars(Status()), "loss": 1.5, "state": "finished"}).encode())
    page = re.sub(r"\s+", "", open(write_report(run_dir)).read())
    assert "Step7,splittest,1,234users,itemsoftheknownpastleftout." in page
    assert "<td>ndcg@10</td><td>0.2500</td><td>0.2000to0.3000</td><td>0.1250</td>" in page
    assert "<td>coverage@10</td><td>0.5000</td><td></td><td></td>" in page
    assert "<td>num_users</td><td>34</td><td>1,200</td>" in page
    assert "<td>recall@5</td><td></td><td>0.7500</td>" in page
    assert "base64,cGljdHVyZQ==" in page and "<td>1.5000</td>" in page


def test_the_command_writes_the_pages_of_all_runs_of_a_folder(run_dir, tmp_path, capsys):
    assert grail(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{run_dir}/report.html\n"
    assert grail(["report"]) == 2
    assert grail(["report", str(tmp_path / "elsewhere")]) == 2
    assert "directories of runs are needed" in capsys.readouterr().err


def test_a_damaged_file_of_a_run_is_named(run_dir, capsys):
    Storage(run_dir).write(EVALUATION, b'{"split": "te')
    assert grail(["report", run_dir]) == 1
    assert f"grail: {run_dir}/{EVALUATION} must be JSON as grail wrote it" in capsys.readouterr().err
