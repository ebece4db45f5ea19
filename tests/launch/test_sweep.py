"""Which runs a sweep is made of, that they are trained once each, and what is made of their numbers."""

import io
import json
import logging
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from matplotlib.axes import Axes
from rich.console import Console

from cluster.errors import ConfigError
from cluster.reporter import StopSignal
from launch import sweep_report, sweep_runs
from launch.cli import run as grail
from launch.scaling_law import fit_law
from launch.sweep_laws import law_of
from launch.sweep_picture import draw_sweep, options_beside
from launch.sweep_plan import plan_runs
from launch.sweep_report import View, _table
from launch.sweep_results import _setting, _sizes, mean_of_last, swept_options
from launch.sweep_runs import SweepRunner
from tests.tiny_run import build_tiny_data

QUICK = (
    "--train.max-steps 2 --log.every-steps 1 --train.precision fp32 --cluster.workers 1 --cluster.in-process "
    "--data.num-streams 2 --model.num-blocks 1"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_tiny_data(tmp_path_factory.mktemp("data"))


def test_points_axes_and_seeds_are_all_combined():
    runs = plan_runs(
        ["model.width=8 model.num-blocks=1", "model.width=16 model.no-item-features"],
        ["train.learning-rate=1e-3,2e-3"],
        (0, 1),
        ["--data.path", "x"],
    )
    assert len(runs) == 8
    run = runs["width-8_num-blocks-1_learning-rate-2e-3_seed-1"]
    assert run.settings == {"model.width": "8", "model.num-blocks": "1", "train.learning-rate": "2e-3"}
    assert run.words == (
        "--seed 1 --model.width 8 --model.num-blocks 1 --train.learning-rate 2e-3 --data.path x".split()
    )
    other = runs["width-16_no-item-features_learning-rate-1e-3_seed-0"]
    assert "--model.no-item-features --train.learning-rate 1e-3 --data.path" in " ".join(other.words)


def test_the_kind_of_a_section_stands_as_it_is_and_options_alike_in_their_end_are_told_apart():
    point = "model.feedforward:feed-forward-config model.feedforward.hidden=64 model.hidden=8"
    ((name, run),) = plan_runs([point], [], (0,), ["--data.path", "x"]).items()
    # Behind the word only the section's own options may stand.
    assert run.words[:6] == "--seed 0 --model.hidden 8 --data.path x".split()
    assert run.words[6:] == ["model.feedforward:feed-forward-config", "--model.feedforward.hidden", "64"]
    assert name == "feedforward-feed-forward-config_model.feedforward.hidden-64_model.hidden-8_seed-0"


def test_options_of_a_kind_that_all_runs_have_stand_behind_it():
    common = ["--data.path", "s3://x", "model.feedforward:mixture-config"]
    runs = plan_runs([], ["model.feedforward.num-experts=2, 4", "--train.learning_rate=-1"], (0,), common)
    assert list(runs) == ["num-experts-2_learning-rate--1_seed-0", "num-experts-4_learning-rate--1_seed-0"]
    words = runs["num-experts-4_learning-rate--1_seed-0"].words
    assert words[2:4] == ["--train.learning-rate", "-1"]
    assert words[-3:] == ["model.feedforward:mixture-config", "--model.feedforward.num-experts", "4"]


@pytest.mark.parametrize(
    ("points", "axes", "common", "message"),
    [
        ([], ["model.width"], [], "must be an option and its values"),
        ([], ["model.width=8,8"], [], "two are width-8_seed-0; take one of them out"),
        ([], ["model.width=8"], ["--run-dir", "x"], "names its runs and their seeds itself, got --run-dir"),
        (
            [],
            ["model.width=8"],
            ["--model.width=16"],
            "--model.width is an option of the sweep and of all runs",
        ),
        ([], ["model.width=8"], ["--seed=3"], "got --seed=3; leave it out, see --seeds"),
        ([], ["model.width=8"], ["--run_dir", "x"], "got --run_dir; leave it out"),
        ([], ["run-dir=a,b"], [], "got --run-dir; leave it out"),
        (["seed=1"], [], [], "got --seed; leave it out"),
        ([], ["model.num_blocks=1,2"], ["--model.num-blocks", "4"], "--model.num-blocks is an option of the"),
        (["model.width=8"], ["model.width=16,32"], [], "an option once, and --model.width comes twice"),
        ([" ".join(f"model.option-{number}=1" for number in range(20))], [], [], "120 characters"),
    ],
)
def test_what_makes_no_sweep_is_refused(points, axes, common, message):
    with pytest.raises(ConfigError, match=message):
        plan_runs(points, axes, (0,), common)


def test_a_list_that_is_given_twice_is_refused(capsys):
    assert grail("sweep sasrec --over model.width=8,16 --over train.epochs=1,2".split()) == 2
    assert "--over must be given once, with all its values" in capsys.readouterr().err


def test_parameters_are_those_that_are_trained():
    """Of a frozen model with adapters, the adapters."""
    shapes = {"blocks.0.weight": [8, 8], "blocks.0.adapter.weight": [8, 2], "blocks.0.choice_bias": [4]}
    tensors = {f"dense/{name}": (shape, None) for name, shape in shapes.items()}
    tensors |= {"exp_avg/blocks.0.adapter.weight": ([16], None), "table/item": ([10, 8], None)}
    reader = SimpleNamespace(shared_state={"dense_shapes": shapes}, tensors=tensors)
    assert _sizes(reader) == {"parameters": 16, "blocks": 16, "table_parameters": 80}


def test_the_loss_is_that_of_the_last_part_of_the_steps_however_long_its_lines_are():
    losses, steps = [9.0, 5.0, 1.0], [0, 50, 100, 110]
    assert mean_of_last(losses, steps, 0.2) == pytest.approx((12 * 5 + 10 * 1) / 22)
    assert mean_of_last(losses, steps, 1.0) == pytest.approx((50 * 9 + 50 * 5 + 10 * 1) / 110)
    assert mean_of_last(losses, steps, 1e-9) == 1.0, "one step at least"


def test_options_beside_leave_the_size_as_it_is():
    rows = [
        {"width": width, "heads": width // 8, "rate": rate, "parameters": width**2}
        for width in (8, 16)
        for rate in (1, 2)
    ]
    assert options_beside(rows, ["width", "heads", "rate"], "parameters") == ["rate"]
    assert options_beside(rows, ["width", "heads", "rate"], "rate") == []
    assert options_beside(rows[:1], ["width", "heads", "rate"], "parameters") == []


def test_a_law_takes_the_mean_over_seeds_of_the_best_setting_of_a_size():
    def losses(size: float) -> dict[str, float]:
        best = 1 + 10 / size**0.5
        return {"rate-1_seed-0": best - 0.1, "rate-1_seed-1": best + 0.1, "rate-2_seed-0": best - 0.05 + 1}

    rows = [
        {"run": f"width-{size}_{name}", "parameters": size, "loss": loss, "step": 10}
        for size in (100, 400, 1600, 6400)
        for name, loss in losses(size).items()
    ]
    law = law_of(rows, "parameters").law
    assert (law.floor, law.scale, law.exponent) == pytest.approx((1, 10, 0.5), rel=1e-2)
    assert law_of(rows[:9], "parameters") is None, "three sizes tell nothing of three numbers"
    assert law_of(rows, "run") is None


def test_of_operations_only_what_nothing_cheaper_beats_counts():
    rows = [{"run": f"a-{cost}_seed-0", "flops": cost, "loss": 1 + 10 / cost} for cost in (1, 10, 100, 1000)]
    wasted = {"run": "b_seed-0", "flops": 500.0, "loss": 9.0}
    assert law_of([*rows, wasted], "flops").law.exponent == pytest.approx(1, rel=1e-2)


def test_seeds_that_took_other_operations_are_one_setting():
    """Operations are counted in a step of each, whose users differ."""
    rows = [
        {"run": f"a-{cost}_seed-{seed}", "flops": cost * (1 + 0.1 * seed), "loss": 1 + 10 / cost + seed}
        for cost in (1.0, 10.0, 100.0, 1000.0)
        for seed in (-1, 1)
    ]
    law = law_of(rows, "flops").law
    assert (law.floor, law.scale, law.exponent) == pytest.approx((1, 10, 1), rel=1e-2)


def runs_of(model, data, *, seeds=(0, 1)) -> list[dict]:
    """Runs of a law with a floor of 1, each seed a little off."""
    return [
        {
            "run": f"width-{size}_max-steps-{steps}_seed-{seed}",
            "parameters": size,
            "step": steps,
            "targets": 128 * steps,
            "state": "finished",
            "loss": 1 + 20 / size**0.5 + 30 / (128 * steps) ** 0.25 + (0.01 if seed else -0.01),
            "flops": 128 * steps * (1000 + 6 * size),
        }
        for size in model
        for steps in data
        for seed in seeds
    ]


def test_runs_of_several_sizes_and_amounts_of_data_follow_a_joint_law():
    rows = runs_of((100, 400, 1600), (10, 100, 1000))
    worse = {**rows[0], "run": "width-100_max-steps-10_learning-rate-9_seed-0", "loss": 30.0}
    others = worse, {**rows[1], "run": "compiled_seed-0", "flops": None}
    law = law_of([*rows, *others], "parameters").law
    assert (law.floor, law.size_exponent, law.data_exponent) == pytest.approx((1, 0.5, 0.25), rel=2e-2)
    assert (law.flops_per_target, law.flops_per_weight) == pytest.approx((1000, 6))
    view = View.of(rows, [], "parameters", "loss")
    assert (
        str(view.law) == str(law_of(rows, "parameters").law)
        and "D: supervised targets seen" in view.note
        and "off by at most 0." in view.note
    )
    assert [split.flops for split in view.splits] == [rows[-1]["flops"] * times for times in (1, 10, 100)]
    files = view.files()
    assert set(files) == {"law.json", "picture.png", "joint.png"} and all(files.values())
    kept = json.loads(files["law.json"])
    assert kept["splits"][1]["flops"] == rows[-1]["flops"] * 10
    assert kept["trust"]["largest"] == 1600 and "95 %: floor 1.000 to 1.000" in view.note
    assert [*kept["trust"]["intervals"]] == ["floor", "size_exponent", "data_exponent"]


def test_where_larger_models_are_worse_no_split_is_the_best():
    """The smallest size that was tried stood there, a model of one parameter."""
    rows = [
        {**row, "loss": 2 + row["parameters"] / 1e4 + 1 / row["targets"] ** 0.3}
        for row in runs_of((100, 400, 1600), (10, 100, 1000))
    ]
    view = View.of(rows, [], "parameters", "loss")
    assert view.splits == [] and "D: supervised targets seen" in view.note
    files = view.files()
    assert files["joint.png"] and "splits" not in json.loads(files["law.json"])


def test_where_data_is_of_few_amounts_the_law_is_of_the_size_and_leaves_nothing_of_another():
    rows = runs_of((100, 400, 1600, 6400), (10, 100))
    view = View.of(rows, [], "parameters", "loss")
    assert str(view.law).startswith("L(N) =") and not view.splits
    assert view.files()["joint.png"] is None and view.files()["law.json"]
    assert View.of(rows[:2], [], "parameters", "loss").files()["law.json"] is None


@pytest.mark.parametrize("losses", [[3, 2, 1, 0], [3, 2, -1, -2], [3, 2, float("nan"), 1]])
def test_where_there_can_be_no_law_there_is_none(losses):
    assert fit_law(np.column_stack(([1, 2, 3, 4], losses))) is None
    assert fit_law([(0, 4), (1, 3), (2, 2), (3, 1)]) is None, (
        "the blocks of a model without any are 0 parameters"
    )


def test_runs_with_and_without_a_switch_are_told_apart(monkeypatch):
    """In the table, and in the picture, where they were one line as if they were seeds."""
    runs = {name: {"settings": settings} for name, settings in {"a": {}, "b": {"model.no-bias": ""}}.items()}
    assert [_setting(run["settings"], *swept_options(runs)) for run in runs.values()] == ["", "yes"]
    rows = [
        {"model.no-bias": given, "width": width, "parameters": 8, "loss": loss}
        for given, loss in (("", 1.0), ("yes", 2.0))
        for width in ("8", "None")
    ]
    settings = _table(rows, ["model.no-bias", "width"], "loss").columns[0]
    assert list(settings.cells) == ["width=8", "width=None", "no-bias=yes width=8", "no-bias=yes width=None"]
    drawn = []
    monkeypatch.setattr(Axes, "errorbar", lambda _, *line, label, **__: drawn.append((*line, label)))
    assert draw_sweep(rows, ["model.no-bias", "width"], "width", "loss", None)
    assert [(sizes, list(means), label) for sizes, means, label in drawn] == [
        (["8", "None"], [1.0, 1.0], "model.no-bias="),
        (["8", "None"], [2.0, 2.0], "model.no-bias=yes"),
    ]
    assert draw_sweep(rows, [], "model.no-bias", "loss", None), "a value that is none has a place of its own"


def test_a_sweep_trains_each_run_once_and_compares_them(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep_runs, "_LOOK_EVERY_S", 0.1)
    out = tmp_path / "sweep"
    line = f"sweep sasrec --out {out} --data.path {data} {QUICK} --over model.width=8,16".split()
    assert grail([*line, "--at-once", "2"]) == 0
    first = (out / "width-8_seed-0" / "metrics.jsonl").read_text()
    assert grail([*line, "--against", "model.width"]) == 0
    assert (out / "width-8_seed-0" / "metrics.jsonl").read_text() == first
    table = pl.read_csv(out / "results.csv")
    assert table["model.width"].to_list() == [8, 16] and set(table["state"]) == {"finished"}
    assert table["step"].to_list() == [2, 2] and table["targets"].n_unique() == 1
    assert table["parameters"].is_sorted() and (table["blocks"] < table["parameters"]).all()
    losses = [json.loads(text)["train/loss"] for text in first.splitlines() if "train/loss" in text]
    assert table["loss"][0] == pytest.approx(losses[-1])
    assert (table["flops"] > 6 * table["blocks"] * table["targets"]).all() and table["flops"].is_sorted()
    assert (out / "picture.png").exists() and "width-16_seed-0" in (out / "report.html").read_text()
    shown = capsys.readouterr().out
    assert "finished" in shown and f"{out}/results.csv" in shown

    assert grail([*line, "--train.learning-rate", "0.5"]) == 2
    assert "holds a run width-8_seed-0 that was asked for with other options" in capsys.readouterr().err
    assert grail([*line, "--metric", "hits"]) == 2
    assert "--metric must be a column of numbers in results.csv (seed, parameters" in capsys.readouterr().err
    assert grail([*line, "--metric", "state"]) == 2 and "got state" in capsys.readouterr().err
    assert grail([*line, "--against", "hits"]) == 2
    assert (
        "--against must be one of parameters, blocks, targets, flops, model.width" in capsys.readouterr().err
    )

    assert grail([*line, "--against", "flops", "--train.compile"]) == 2
    assert "operations, which are not counted with train.compile" in capsys.readouterr().err

    drawn = []
    monkeypatch.setattr(sweep_report, "draw_sweep", lambda rows, *_: drawn.extend(rows) or b"")
    (out / "width-8_seed-0" / "status.json").write_text(json.dumps({"state": "stopped", "updated_at_s": 1.0}))
    assert grail([*line[:-2], "--over", "model.width=16"]) == 0
    assert pl.read_csv(out / "results.csv")["state"].to_list() == ["stopped", "finished"]
    assert [row["run"] for row in drawn] == ["width-16_seed-0"], (
        "what is half trained has no loss of its size"
    )


RUN = """
import json, os, pathlib, signal, sys, time
command, run_dir, behaviour = sys.argv[1], pathlib.Path(sys.argv[-2]), sys.argv[-1]
if command == "evaluate":
    pathlib.Path(sys.argv[2], "evaluation.json").write_text("{}")
    sys.exit()
run_dir.mkdir()
if behaviour == "waits":
    signal.signal(signal.SIGTERM, lambda *_: (run_dir / "saved").touch() or sys.exit(75))
    (run_dir / "begun").touch()
    time.sleep(60)
if behaviour.isdigit():
    sys.exit(int(behaviour))
if behaviour == "fails":
    sys.exit("no such luck")
if behaviour == "says nothing":
    sys.exit()
(run_dir / "status.json").write_text(json.dumps({"state": "finished"}))
"""
"""A command that does to a run what `grail pretrain` and `grail evaluate` do, in no time."""


def make_runner(out, monkeypatch, behaviours: dict[str, str], **options) -> SweepRunner:
    monkeypatch.setattr(sweep_runs, "GRAIL", (sys.executable, "-c", RUN))
    monkeypatch.setattr(sweep_runs, "_LOOK_EVERY_S", 0.05)
    out.mkdir()
    commands = {name: ["sasrec", str(out / name), behaviour] for name, behaviour in behaviours.items()}
    return SweepRunner(str(out), commands, **{"at_once": 1, "evaluate": False, **options})


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "launch.sweep_runs")
    runner = make_runner(tmp_path / "sweep", monkeypatch, {"a": "fails", "b": "ends", "c": "says nothing"})
    assert runner.run(Console(file=io.StringIO()), StopSignal())
    assert runner.failed == ["a", "c"] and (tmp_path / "sweep" / "a.log").read_text() == "no such luck\n"
    assert "a failed with exit code 1" in caplog.text and "no such luck" in caplog.text
    assert "c: 3 of 3 runs worked off, about 0 s left" in caplog.text


def test_runs_are_evaluated_where_that_is_asked_for(tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    runner = make_runner(out, monkeypatch, {"a": "ends", "b": "ends"}, evaluate=True, at_once=2)
    assert runner.run(Console(file=io.StringIO()), StopSignal()) and not runner.failed
    assert (out / "a" / "evaluation.json").exists() and (out / "b" / "evaluation.json").exists()
    again = SweepRunner(str(out), runner.commands, at_once=1, evaluate=True)
    assert not again.waiting


def test_a_stop_lets_the_runs_at_work_save_and_starts_no_other(tmp_path, monkeypatch):
    out, stop = tmp_path / "sweep", StopSignal()
    runner = make_runner(out, monkeypatch, {"a": "waits", "b": "ends"})

    def stop_once_begun() -> None:
        while not (out / "a" / "begun").exists():
            time.sleep(0.05)
        stop.request()

    thread = threading.Thread(target=stop_once_begun, daemon=True)
    thread.start()
    assert not runner.run(Console(file=io.StringIO()), stop)
    assert (out / "a" / "saved").exists() and not (out / "b").exists() and not runner.failed


@pytest.mark.parametrize("code", [75, 143])
def test_a_run_that_was_stopped_has_neither_failed_nor_been_worked_off(tmp_path, monkeypatch, caplog, code):
    """75 once it has saved, 143 while it was starting."""
    caplog.set_level(logging.INFO, "launch.sweep_runs")
    runner = make_runner(tmp_path / "sweep", monkeypatch, {"a": str(code), "b": "ends"})
    assert not runner.run(Console(file=io.StringIO()), StopSignal()), (
        "the sweep must say that it is not whole"
    )
    assert runner.stopped == ["a"] and not runner.failed and "failed" not in caplog.text
    assert "b: 1 of 2 runs worked off" in caplog.text
