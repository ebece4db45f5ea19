"""Commands of the project in processes of their own, as a person would give them."""

import json
import subprocess
import sys
from pathlib import Path

from cluster.errors import ClusterError


def grail(*arguments: str) -> None:
    """Raises: ClusterError with what the command said."""
    done = subprocess.run([sys.executable, "-m", "launch.cli", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"grail {' '.join(arguments)} must succeed and said: {done.stderr[-2000:]}")


def evaluated(run_dir: Path, *options: str) -> dict:
    """The content of evaluation.json after `grail evaluate RUN_DIR`."""
    grail("evaluate", str(run_dir), *options)
    return json.loads((run_dir / "evaluation.json").read_text())
