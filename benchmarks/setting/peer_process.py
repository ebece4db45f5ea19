"""Peers whose packages grail does not have: a process of their own in an environment made on demand.

The environment lies inside grail's own (`.venv/peers`) and sees all of its packages, so both sides run the same
build of torch; only what benchmarks/peers/requirements.txt lists is added, and grail cannot see it.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from benchmarks.peers.answers import ANSWERS
from cluster.errors import ClusterError

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "benchmarks" / "peers" / "requirements.txt"


def peer_python() -> Path:
    """The interpreter of the peers' environment, which is made where it is missing or older than its pins.

    Raises: ClusterError with what pip said.
    """
    folder = Path(sys.prefix) / "peers"
    python, stamp_file = folder / "bin" / "python", folder / "grail-stamp"
    stamp = hashlib.sha256(f"{sys.version} {sys.prefix} {REQUIREMENTS.read_text()}".encode()).hexdigest()
    with (Path(sys.prefix) / "peers.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp_file.exists() or stamp_file.read_text() != stamp:
            shutil.rmtree(folder, ignore_errors=True)
            _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
            _packages(python).joinpath("grail.pth").write_text(sysconfig.get_path("purelib") + "\n")
            pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
            _run([*pip, "--requirement", str(REQUIREMENTS)])
            stamp_file.write_text(stamp)
    return python


def _packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(
        subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(
            f"the peers' packages must be installed once, which needs the package index, and "
            f"`{' '.join(command)}` failed; run it by hand to see why:\n{done.stderr.strip()}"
        )


class PeerProcess:
    """A module of benchmarks/peers that answers one JSON line with another.

    It gets a folder to read from and its number of threads as arguments, and ends when its input is closed.
    """

    def __init__(self, module: str, folder: Path, num_threads: int):
        threads = {"OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads)}
        answers, write_end = os.pipe()
        self._process = subprocess.Popen(
            [peer_python(), "-m", module, str(folder), str(num_threads)],
            cwd=ROOT,
            env={
                **os.environ,
                **threads,
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": str(ROOT),
                ANSWERS: str(write_end),
            },
            pass_fds=(write_end,),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        os.close(write_end)
        self._answers = os.fdopen(answers)

    def ask(self, **question: Any) -> dict[str, Any]:
        """Raises: ClusterError where the peer has died."""
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise ClusterError(
                f"a peer must answer {question}, and its process ended with exit code {self._process.wait()}; "
                f"run it by hand: {' '.join(map(str, self._process.args))}"
            )
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._answers.close()
