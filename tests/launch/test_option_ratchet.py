"""The options of a run are a promise to scripts: they change on purpose, in option_names.txt, or not at all."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.source_tree import ROOT

STORED = Path(__file__).with_name("option_names.txt")
PROMISED = {
    *("--data.path", "--run-dir", "--cluster.workers", "--cluster.address", "--seed", "--resume"),
    *("--train.max-steps", "--train.epochs", "--train.patience", "--data.on-bad-shard"),
    *("--log.wandb", "--profile", "--init-from"),
}


def option_names(*command: str) -> set[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1"}
    shown = subprocess.run(
        [sys.executable, "-m", "launch.cli", *command, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=120,
        check=True,
    )
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", shown.stdout))


def test_the_options_of_pretraining_are_those_that_are_written_down():
    found = option_names("pretrain", "sasrec")
    assert found >= PROMISED
    assert sorted(found) == STORED.read_text().split(), f"if the change is meant, write it to {STORED.name}"
