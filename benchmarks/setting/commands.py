"""Commands of the project in processes of their own, as a person would give them."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import polars as pl

from cluster.errors import ClusterError, ConfigError, GrailError
from cluster.storage import renamed_at_end

COMMAND = (sys.executable, "-m", "launch.cli")
NO_LIMIT = "100000"
"""Epochs."""
_STOP_S = 60.0
"""How long a command may take to save and end."""


def run_experiment(main: Callable[[list[str]], None]) -> int:
    """Give an experiment the words of the command line; an error that a person meets is told in one line.

    Returns its exit code: 0 done, 1 failed, 2 wrong options, 130 where it was ended by Ctrl-C or SIGTERM.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(sys.argv[1:])
    except GrailError as error:
        print(f"experiment: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("experiment: interrupted; the same command goes on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def require_known(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises: ConfigError where an option was given names that there are not."""
    if unknown := {*given} - {*(known := [*known])}:
        raise ConfigError(f"{option} must be of {', '.join(known)}; got {', '.join(sorted(unknown))}")


def grail(*arguments: str) -> None:
    """Raises: ClusterError with what the command said."""
    child = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, said = child.communicate()
    except BaseException:
        # It must not go on where nobody waits for it; a run saves first.
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=_STOP_S)
        child.kill()
        raise
    if child.returncode:
        raise ClusterError(f"grail {' '.join(arguments)} must succeed and said: {said[-2000:]}")


def evaluated(run_dir: Path, *options: str) -> dict:
    """The content of evaluation.json after `grail evaluate RUN_DIR`."""
    grail("evaluate", str(run_dir), *options)
    return json.loads((run_dir / "evaluation.json").read_text())


def option_words(pairs: Iterable[str]) -> list[str]:
    """Options given as NAME=VALUE, as words of a command."""
    return [word for pair in pairs for word in f"--{pair}".split("=", 1)]


def words_of_steps(steps: int) -> list[str]:
    """Options of a run that takes so many steps, however many epochs they are."""
    return ["--train.epochs", NO_LIMIT, "--train.max-steps", str(steps)]


def folder_name(name: str) -> str:
    """Example: "GRPO-SR, hit + rank" -> "grpo-sr-hit-rank"."""
    return name.lower().replace(", ", " ").replace(" + ", " ").replace(" ", "-")


def keep_words(file: Path, words: Sequence[str], result: Path) -> None:
    """Write down beside a result what it was asked with, so that it is not taken for the answer to something else.

    Until it is there, or what it begins with, it may be asked with others: the ones before were refused.

    Raises: ConfigError where it was asked with other words, or nobody knows with which.
    """
    if not result.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with renamed_at_end(file) as written:
            written.write_text(json.dumps(list(words)))
        return
    before = json.loads(file.read_text()) if file.exists() else None
    if before != list(words):
        raise ConfigError(
            f"{result} must be of the options at hand, {' '.join(words)}, and is of "
            f"{'others that were not written down' if before is None else ' '.join(before)}; name another --out"
        )


def pretrain_once(run_dir: Path, recipe: str, *options: str) -> Path:
    """Train a run unless it is finished; one that was broken off goes on.

    Raises: ConfigError where the run directory holds a run with other options.
    """
    status = run_dir / "status.json"
    keep_words(run_dir / "command.json", [recipe, *options], status)
    if not status.exists() or json.loads(status.read_text())["state"] != "finished":
        grail("pretrain", recipe, "--run-dir", str(run_dir), *options)
    return run_dir


def evaluated_users(run_dir: Path, name: str, *options: str) -> pl.DataFrame:
    """Metrics by user, evaluated once; they are kept in the run directory under this name.

    Raises: ConfigError where they are there of other options.
    """
    kept = run_dir / f"users-{name}.parquet"
    keep_words(kept.with_suffix(".json"), options, kept)
    if not kept.exists():
        grail("evaluate", str(run_dir), *options, "--per-user", str(kept))
    return pl.read_parquet(kept)
