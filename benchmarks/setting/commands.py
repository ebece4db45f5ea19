"""Commands of the project in processes of their own, as a person would give them."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import polars as pl

from cluster.errors import ClusterError

NO_LIMIT = "100000"
"""Epochs."""


def grail(*arguments: str) -> None:
    """Raises: ClusterError with what the command said."""
    done = subprocess.run([sys.executable, "-m", "launch.cli", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"grail {' '.join(arguments)} must succeed and said: {done.stderr[-2000:]}")


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


def pretrain_once(run_dir: Path, recipe: str, *options: str) -> Path:
    """Train a run unless it is finished; one that was broken off goes on."""
    status = run_dir / "status.json"
    if not status.exists() or json.loads(status.read_text())["state"] != "finished":
        grail("pretrain", recipe, "--run-dir", str(run_dir), *options)
    return run_dir


def evaluated_users(run_dir: Path, name: str, *options: str) -> pl.DataFrame:
    """Metrics by user, evaluated once; they are kept in the run directory under this name."""
    kept = run_dir / f"users-{name}.parquet"
    if not kept.exists():
        grail("evaluate", str(run_dir), *options, "--per-user", str(kept))
    return pl.read_parquet(kept)
