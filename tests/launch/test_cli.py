import errno
import os
import subprocess
import sys

import pytest

from cluster.packages import root
from launch import cli
from launch.options import take_option


def grail(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(command, cwd=root(), capture_output=True, text=True, timeout=60)


def test_help_lists_every_command_and_imports_nothing_slow():
    program = (
        "import sys, launch.cli; code = launch.cli.run(['--help']);"
        "slow = {'torch', 'ray', 'numpy', 'polars', 'tyro', 'rich', 'matplotlib'} & set(sys.modules);"
        "assert code == 0 and not slow, slow"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], cwd=root(), capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0, shown.stderr
    for command in (
        "pretrain", "evaluate", "recommend", "demo", "data build", "data inspect", "checkpoint inspect",
        "checkpoint export", "status",
    ):  # fmt: skip
        (line,) = [line for line in shown.stdout.splitlines() if line.startswith(f"  {command} ")]
        assert len(line.split()) > 4, f"{command} has no description"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evalute", "r"], "there is no command 'evalute r'; did you mean 'grail evaluate'?"),
        (["data", "bild"], "there is no command 'data bild'; did you mean 'grail data build'?"),
        (["pretrain", "sasrek"], "'sasrek' is neither; did you mean 'sasrec'?"),
        (["pretrain"], "needs a recipe or the config.yaml of a run in front of the options"),
        (["data", "build", "evnts"], "a source in front of the options, got 'evnts'; did you mean 'events'?"),
        (["pretrain", "sasrec", "--objective", "full-sofmax"], "did you mean 'full-softmax'?"),
        (["pretrain", "sasrec", "--objective", "negatives"], "in-batch-softmax, sampled-softmax, top1"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest_valid_one(arguments, message, capsys):
    assert cli.run(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_an_unknown_option_ends_with_the_nearest_valid_one(capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(["pretrain", "sasrec", "--model.num-bloks", "3"])
    assert end.value.code == 2
    assert "--model.num-blocks" in capsys.readouterr().err


def test_a_missing_run_is_an_error_without_a_traceback(capsys, tmp_path):
    assert cli.run(["evaluate", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("grail: ") and "there is none" in error and "Traceback" not in error


@pytest.mark.parametrize("num_words", [10, 100_000])
def test_a_reader_that_has_enough_ends_a_command_in_silence(num_words):
    program = (
        "import sys, types; from launch import cli; "
        f"cli.load_plugin = lambda *_: types.SimpleNamespace(run=lambda _: print('word ' * {num_words})); "
        "sys.stdin.read(); sys.exit(cli.run(['status']))"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=root(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    command.stdout.close()
    command.stdin.close()
    assert command.stderr.read() == b"" and command.wait(60) == 141


def test_a_pipe_that_breaks_elsewhere_is_a_mistake(monkeypatch):
    def fail(*_):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "load_plugin", fail)
    with open(os.devnull, "w") as stdout, pytest.raises(BrokenPipeError):
        monkeypatch.setattr(sys, "stdout", stdout)
        cli.run(["status"])


def test_a_full_disk_is_an_error_without_a_traceback_and_other_errors_of_the_system_are_mistakes(
    capsys, monkeypatch
):
    def fail(number):
        raise OSError(number, os.strerror(number), "/runs/a/lease.json")

    monkeypatch.setattr(cli, "find_command", lambda arguments: fail(errno.ENOSPC))
    assert cli.run(["pretrain"]) == 1
    assert capsys.readouterr().err == (
        "grail: /runs/a/lease.json must have room to write, and the system says: No space left on device; make "
        "room, then start again to go on from the latest checkpoint\n"
    )
    monkeypatch.setattr(cli, "find_command", lambda arguments: fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        cli.run(["pretrain"])


@pytest.mark.parametrize("number", [errno.ENOTDIR, errno.EACCES, errno.EEXIST])
def test_a_path_that_cannot_be_used_is_an_error_without_a_traceback(capsys, monkeypatch, number):
    def fail(arguments):
        raise OSError(number, os.strerror(number), "/data/events.csv/manifest.json")

    monkeypatch.setattr(cli, "find_command", fail)
    assert cli.run(["pretrain"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("grail: /data/events.csv/manifest.json must be a path that can be used here")
    assert f"the system says: {os.strerror(number)}; look at the paths you gave" in error


def test_the_first_word_of_commands_lists_those_that_begin_with_it(capsys):
    assert cli.run(["checkpoint"]) == 0
    output = capsys.readouterr().out
    assert "checkpoint export" in output and "pretrain" not in output


def test_the_console_module_can_be_run():
    shown = grail("--help")
    assert shown.returncode == 0 and "usage: grail COMMAND" in shown.stdout


def test_an_option_can_be_taken_out_before_the_others_are_parsed():
    assert take_option(["--a", "1", "--objective", "x", "--b"], "--objective") == ("x", ["--a", "1", "--b"])
    assert take_option(["--objective=x"], "--objective") == ("x", [])
    assert take_option(["--a"], "--objective") == (None, ["--a"])


def test_sigterm_ends_a_command_in_one_line_and_lets_it_clean_up(tmp_path):
    program = """
import pathlib, sys, time
from launch import cli

def command(arguments):
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        pathlib.Path(sys.argv[1]).touch()

cli.run = command
cli.main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "cleaned")],
        cwd=root(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    process.terminate()
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (143, "grail: ended by SIGTERM\n")
    assert (tmp_path / "cleaned").exists()
