"""TDM as a person would type it: a tree from categories, a run on it, trees from the run, and what is refused."""

import re

import numpy as np
import pytest

from data_streams.item_table import ItemTable
from data_streams.semantic_ids import SemanticIdTable
from launch.cli import run as grail
from tests.tiny_run import (
    NUM_ITEMS,
    build_tiny_data,
)

TINY = (
    "--cluster.workers 1 --cluster.in-process --model.width 8 --model.windows 2 1 --model.hidden 8 "
    "--model.attention-hidden 4 --model.num-negatives 20 --data.num-streams 2 --data.max-length 10 "
    "--train.max-steps 3 --train.precision fp32 --evaluation.bootstrap-resamples 0"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_tiny_data(tmp_path_factory.mktemp("data"), categories=True)


@pytest.fixture(scope="module")
def tree(data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("tree") / "first")
    assert grail(["tokenize", "tree", "--data", data, "--out", out]) == 0
    return out


@pytest.fixture(scope="module")
def trained(data, tree, tmp_path_factory):
    run_dir = str(tmp_path_factory.mktemp("run"))
    assert grail(pretrain_line(data, tree, run_dir)) == 0
    return run_dir


def pretrain_line(data: str, tree: str, run_dir: str, *options: str) -> list[str]:
    line = ["pretrain", "tdm", "--data.path", data, "--run-dir", run_dir, *TINY, *options]
    return [*line, "--data.semantic-ids", tree] if tree else line


def load(tree: str, data: str) -> SemanticIdTable:
    return SemanticIdTable.load(tree, ItemTable.load(data).item_ids)


def test_a_run_is_evaluated_and_recommends(trained, capsys):
    assert grail(["evaluate", trained, "--baselines"]) == 0
    assert "hrecall1@50" in capsys.readouterr().out
    assert grail(["recommend", trained, "--users", "2"]) == 0
    assert len(re.findall(r"Title \d+ ", capsys.readouterr().out)) >= 20


@pytest.mark.parametrize(("how", "options"), [("cluster", []), ("joint", ["--levels", "2"])])
def test_a_tree_is_made_anew_from_a_run_and_a_run_goes_on_with_it(
    data, tree, trained, tmp_path, capsys, how, options
):
    out = str(tmp_path / "second")
    line = ["tokenize", "tree", "--data", data, "--out", out, "--from-run", trained, "--how", how]
    assert grail([*line, *options]) == 0
    printed = capsys.readouterr().out
    first, second = load(tree, data), load(out, data)
    assert second.code_sizes == first.code_sizes and second.fingerprint != first.fingerprint
    assert len(np.unique(second.codes, axis=0)) == NUM_ITEMS
    for depth in range(1, second.num_levels):
        _, sizes = np.unique(second.codes[:, :depth], axis=0, return_counts=True)
        assert sizes.max() <= 2 ** (second.num_levels - depth)
    if how == "joint":
        before, after = map(float, re.search(r"ancestors (\S+) before, (\S+) after", printed).groups())
        assert after > before
    assert grail(pretrain_line(data, out, str(tmp_path / "run"), "--init-from", trained)) == 0


def test_what_a_tree_cannot_be_made_of_is_told(data, tree, trained, tmp_path, capsys):
    plain, out = build_tiny_data(tmp_path / "plain"), str(tmp_path / "out")
    line = ["tokenize", "tree", "--out", out]
    for options, code, message in (
        (["--data", plain], 2, "needs items with categories that tell them apart"),
        (["--data", data, "--how", "joint"], 2, "--how joint needs --from-run RUN"),
        (["--data", data, "--how", "categories", "--from-run", trained], 2, "takes no --from-run"),
        (["--data", data, "--branching", "3"], 2, "--branching must be a power of two"),
        (["--data", data, "--from-run", str(tmp_path)], 1, "must be a run directory"),
        (
            ["--data", data, "--how", "joint", "--from-run", trained, "--positions", "0"],
            2,
            "--positions must be",
        ),
        (["--data", data, "--positions", "4"], 2, "--positions is for --how joint, and got 4 with --how cat"),
        (["--data", data, "--checkpoint", "latest"], 2, "--checkpoint is for --how cluster and joint"),
        (["--data", data, "--from-run", trained, "--levels", "2"], 2, "--levels is for --how joint"),
        (
            ["--data", data, "--how", "joint", "--from-run", trained, "--branching", "4"],
            2,
            "--branching is for --how categories and cluster, and got 4 with --how joint",
        ),
    ):
        assert grail([*line, *options]) == code
        assert message in capsys.readouterr().err


def test_a_joint_tree_needs_the_run_of_a_scorer(data, tmp_path, capsys):
    options = (
        "--cluster.workers 1 --cluster.in-process --data.num-streams 2 --train.max-steps 1 --model.width 8"
    )
    run_dir = str(tmp_path / "run")
    assert grail(["pretrain", "sasrec", "--data.path", data, "--run-dir", run_dir, *options.split()]) == 0
    line = ["tokenize", "tree", "--data", data, "--from-run", run_dir, "--out"]
    assert grail([*line, str(tmp_path / "joint"), "--how", "joint"]) == 2
    assert "holds a SASRec; train one (recipe tdm), or give --how cluster" in capsys.readouterr().err
    assert grail([*line, str(tmp_path / "cluster")]) == 0


def test_a_run_without_a_tree_or_with_that_of_another_catalogue_is_refused(data, tmp_path, capsys):
    assert grail(pretrain_line(data, "", str(tmp_path / "run"))) == 2
    assert "TDM finds items by semantic IDs and needs --data.semantic-ids" in (
        error := capsys.readouterr().err
    )
    assert "make one with grail tokenize tree" in error
    other = build_tiny_data(tmp_path / "other", first_item=1000, categories=True)
    out = str(tmp_path / "tree")
    assert grail(["tokenize", "tree", "--data", other, "--out", out]) == 0
    assert grail(pretrain_line(data, out, str(tmp_path / "run"))) == 1
    assert f"must have the {NUM_ITEMS} items of the data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("tdm", "--search.method sample", "a tree is searched by a beam"),
        ("tdm", f"--search.validation-width {NUM_ITEMS + 1}", f"must not exceed the {NUM_ITEMS} items"),
        ("sasrec", "--search.deny nowhere.txt", "search.deny must be a text file"),
        ("sasrec", "--evaluation.condition filter", "needs evaluation.condition-column"),
    ],
)
def test_what_validation_could_not_search_with_is_refused_before_the_first_step(
    data, tree, tmp_path, capsys, monkeypatch, recipe, options, message
):
    monkeypatch.setattr("trainer.start.train", lambda job: pytest.fail("it is trained"))
    line = pretrain_line(data, tree, str(tmp_path / "run"))
    if recipe == "sasrec":
        line = ["pretrain", "sasrec", "--data.path", data, "--run-dir", str(tmp_path / "run"), *TINY[:3]]
    assert grail([*line, *options.split()]) == 2
    assert message in capsys.readouterr().err
