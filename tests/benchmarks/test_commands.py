import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import psutil
import pytest

from benchmarks import experiments
from benchmarks.setting import commands
from benchmarks.setting.commands import pretrain_once, run_experiment
from cluster.errors import ClusterError, ConfigError

EXPERIMENTS = sorted(
    path for path in Path(experiments.__file__).parent.glob("*.py") if path.stem != "__init__"
)


def test_a_finished_run_is_not_repeated_and_not_taken_for_one_of_other_options(tmp_path, monkeypatch):
    given, states = [], iter(("stopped", "finished"))

    def grail(*words):
        given.append(words)
        (tmp_path / "run" / "status.json").write_text(json.dumps({"state": next(states)}))

    monkeypatch.setattr(commands, "grail", grail)
    for _ in range(3):
        assert pretrain_once(tmp_path / "run", "sasrec", "--data.path", "beauty") == tmp_path / "run"
    words = ("pretrain", "sasrec", "--run-dir", str(tmp_path / "run"), "--data.path", "beauty")
    assert given == [words, words]
    with pytest.raises(
        ConfigError, match=r"--data.path ml-1m, and is of sasrec --data.path beauty; name another --out"
    ):
        pretrain_once(tmp_path / "run", "sasrec", "--data.path", "ml-1m")
    (tmp_path / "run" / "command.json").unlink()
    with pytest.raises(
        ConfigError, match=r"status.json must be of .* and is of others that were not written down"
    ):
        pretrain_once(tmp_path / "run", "sasrec", "--data.path", "beauty")


def test_a_run_that_was_refused_may_be_asked_for_with_other_options(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "grail", lambda *words: None)
    pretrain_once(tmp_path / "run", "sasrec", "--cluster.workers", "0")
    pretrain_once(tmp_path / "run", "sasrec", "--cluster.workers", "1")
    assert json.loads((tmp_path / "run" / "command.json").read_text())[-1] == "1"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("alignment", ["--worlds", "flat"]),
        ("objectives", ["--data", "x", "--recipe", "sasrec", "--names", "flat"]),
        ("onerec_flops", ["--sizes", "flat"]),
        ("tokenizers", ["--data", "x", "--text", "x.npy", "--run", "x", "--tokenizers", "flat"]),
        ("tokenizers", ["--data", "x", "--text", "x.npy", "--run", "x", "--inputs", "flat"]),
    ],
)
def test_an_experiment_refuses_unknown_names_before_anything_is_written(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^{words[-2]} must be of .*; got flat$"):
        import_module(f"benchmarks.experiments.{name}").main(words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_tells_errors_in_one_line(path):
    assert path.read_text().endswith('\n\nif __name__ == "__main__":\n    sys.exit(run_experiment(main))\n')


def test_errors_that_a_person_meets_end_an_experiment_with_a_line_and_a_code(capsys):
    def raising(error):
        def main(_):
            raise error

        return main

    assert run_experiment(raising(ConfigError("--sizes must be of 1b"))) == 2
    assert run_experiment(raising(ClusterError("grail pretrain must succeed"))) == 1
    assert run_experiment(raising(KeyboardInterrupt())) == 130
    assert run_experiment(lambda _: None) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["experiment: --sizes must be of 1b", "experiment: grail pretrain must succeed"]


SLOW = """
import os, sys, time
print(os.getpid(), file=open(sys.argv[1], "w"), flush=True)
time.sleep(60)
"""
EXPERIMENT = """
import sys
from benchmarks.setting import commands
commands.COMMAND = (sys.executable, "-c", {slow!r})
sys.exit(commands.run_experiment(lambda _: commands.grail({file!r})))
"""


def test_an_experiment_that_is_ended_ends_the_command_it_waits_for(tmp_path):
    file = tmp_path / "pid"
    script = EXPERIMENT.format(slow=SLOW, file=str(file))
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as experiment:
        until = time.monotonic() + 60
        while not (file.exists() and file.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        experiment.terminate()
        _, said = experiment.communicate(timeout=60)
    assert experiment.returncode == 130 and "the same command goes on" in said
    assert not psutil.pid_exists(int(file.read_text()))


def test_objectives_are_not_compared_on_a_model_that_has_none_to_replace():
    with pytest.raises(ConfigError, match=r"--recipe must have an objective .*tdm has a loss of its own"):
        import_module("benchmarks.experiments.objectives").main(["--data", "x", "--recipe", "tdm"])
