"""A real Ray cluster of several nodes on this machine, each node a raylet of its own, for tests of lost hosts."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from cluster.packages import root

START_TIMEOUT_S = 60.0


class RayCluster:
    """The head holds no workers unless it is given cores; a context manager that leaves nothing behind."""

    def __init__(self, head_cpus: int = 0):
        # Short, because the path of a Unix socket may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))
        self.port = _free_port()
        self.address = f"127.0.0.1:{self.port}"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        self.nodes: list[subprocess.Popen] = []
        self._family: set[psutil.Process] = set()
        self.head = self._start("--head", f"--port={self.port}", "--include-dashboard=false", cpus=head_cpus)

    def __enter__(self) -> "RayCluster":
        return self

    def __exit__(self, *_: object) -> None:
        for node in [*self.nodes, self.head]:
            self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add_node(self, cpus: int = 1) -> subprocess.Popen:
        self.nodes.append(self._start(f"--address={self.address}", cpus=cpus))
        return self.nodes[-1]

    def kill(self, node: subprocess.Popen) -> None:
        """Everything on a node at one moment, as when its host loses power."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(node.pid)
            family = [process, *process.children(recursive=True)]
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for member in family:
                    with suppress(psutil.NoSuchProcess):
                        member.send_signal(number)
        node.wait(30)

    def _start(self, *options: str, cpus: int) -> subprocess.Popen:
        log = self.folder / f"node-{len(self.nodes)}.txt"
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--object-store-memory=80000000"),
            *options,
        ]
        if "--head" in options:
            command.append(f"--temp-dir={self.folder}")
        environment = {
            **os.environ,
            "PYTHONPATH": str(root()),
            "RAY_AUTH_MODE": "token",
            "RAY_worker_niceness": "0",
        }
        with open(log, "w") as file:
            node = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        return node


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
