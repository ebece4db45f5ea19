"""Every benchmark runs at a tiny size and writes what `make bench` promises."""

import json
import math

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.setting.benchmark import Bar
from benchmarks.setting.users import build_users
from cluster.plugins import plugin_files

PROMISED = {"name", "ours", "peer", "ratio", "unit", "command", "cpu_seconds", "bars"}


NAMES = list(plugin_files("benchmarks"))


@pytest.fixture(scope="module")
def users(tmp_path_factory) -> str:
    return build_users(tmp_path_factory.mktemp("benchmarks") / "users", "small")


def test_the_benchmarks_are_found():
    assert {"build", "checkpoint", "growth", "long-sequences", "sparse", "step", "stream"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_writes_its_comparison(name, users, tmp_path, capsys):
    assert main([name, "--scale", "small", "--results", str(tmp_path), "--data", users]) == 0
    assert [path.stem for path in tmp_path.glob("*.json")] == [name]
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result.keys() >= PROMISED
    assert result["name"] == name and name in result["command"]
    assert math.isclose(result["ratio"], result["ours"] / result["peer"])
    assert result["ours"] > 0 and min(result["cpu_seconds"].values()) > 0
    assert len(set(map(len, result["rounds_s"].values()))) == 1, "both sides take the same rounds"
    assert name in capsys.readouterr().out
    if name == "sparse":
        assert 0 < result["largest_difference"] < 1e-5, "both tables take the same steps"


def test_an_unknown_benchmark_is_answered_with_the_nearest_name(tmp_path, capsys):
    assert main(["strem", "--results", str(tmp_path)]) == 2
    assert "did you mean 'stream'?" in capsys.readouterr().err


def test_sizes_for_an_accelerator_are_refused_where_there_are_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["experts", "--scale", "accelerator", "--results", str(tmp_path)]) == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["stream", "experts", "--scale", "accelerator", "--results", str(tmp_path)]) == 2
    assert "stream runs on processors only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bar", "value", "met"),
    [
        (Bar(key="ratio", at_least=50.0), 50.0, True),
        (Bar(key="ratio", at_least=50.0), 49.9, False),
        (Bar(key="ratio", at_most=1.1), 1.1, True),
        (Bar(key="ratio", at_most=1.1), 1.2, False),
    ],
)
def test_a_bar_is_met_on_its_own_side(bar, value, met):
    assert bar.is_met({"ratio": value}) is met
