"""Two hosts on one machine: network namespaces with an address each, joined by a bridge, every one a Ray node."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from tests.faults.training import ENVIRONMENT

NETWORK = "10.77.{}.{}"
PORT = 6379


class NoHostsError(Exception):
    """Network namespaces cannot be made here."""


class TwoHosts:
    """Host 1 is the head of the Ray cluster and holds the driver; host 2 comes and goes. Each has one core.

    Raises: NoHostsError without root or `ip`.
    """

    def __init__(self) -> None:
        if os.geteuid() or not shutil.which("ip") or _run("ip", "netns", "list", check=False).returncode:
            raise NoHostsError("two hosts need root and network namespaces (`ip netns`)")
        # Several of these may run on one machine, so names and addresses carry a number of this process.
        self.number = os.getpid() % 200
        self.bridge = f"gb{self.number}"
        self.folder = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))
        self.environment = {
            **ENVIRONMENT,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }

    def __enter__(self) -> "TwoHosts":
        with ExitStack() as undo:
            undo.callback(self.__exit__)
            self._make_network()
            self.start_ray(1)
            self.start_ray(2)
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for host in (1, 2):
            self.kill_host(host)
            _run("ip", "netns", "del", self.name(host), check=False)
        _run("ip", "link", "del", self.bridge, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def name(self, host: int) -> str:
        return f"grail{self.number}-{host}"

    def address(self, host: int) -> str:
        return NETWORK.format(self.number, host)

    @property
    def ray_address(self) -> str:
        return f"{self.address(1)}:{PORT}"

    def prefix(self, host: int) -> list[str]:
        """The words in front of a command that is to run on a host."""
        return ["ip", "netns", "exec", self.name(host)]

    def start_ray(self, host: int) -> None:
        """Make a host a node of the cluster."""
        place = ["--head", f"--port={PORT}", "--include-dashboard=false"] if host == 1 else []
        place += [] if host == 1 else [f"--address={self.ray_address}"]
        log = self.folder / f"host-{host}.txt"
        command = [
            *self.prefix(host),
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            *(f"--node-ip-address={self.address(host)}", "--num-cpus=1", "--object-store-memory=80000000"),
            # Hidden options of Ray 2.60: without the autoscaler and what copies logs a node starts sooner.
            *("--no-monitor", "--include-log-monitor=false"),
            *(f"--temp-dir={self.folder}/{host}", *place),
        ]
        with open(log, "w") as file:
            node = subprocess.Popen(
                command, env=self.environment, stdout=file, stderr=file, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    def runs(self, host: int) -> bool:
        return bool(self._processes(host))

    def workers(self, host: int) -> list[psutil.Process]:
        return [process for process in self._processes(host) if process.name().startswith("ray::GangWorker")]

    def kill_host(self, host: int) -> None:
        """All of a host's processes at one moment, as when it loses its power."""
        processes = self._processes(host)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        psutil.wait_procs(processes, timeout=10)

    def _processes(self, host: int) -> list[psutil.Process]:
        listed = _run("ip", "netns", "pids", self.name(host), check=False).stdout.split()
        found = []
        for pid in listed:
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def _make_network(self) -> None:
        try:
            _run("ip", "link", "add", self.bridge, "type", "bridge")
            _run("ip", "link", "set", self.bridge, "up")
            for host in (1, 2):
                self._make_host(host)
        except subprocess.CalledProcessError as error:
            raise NoHostsError(f"network namespaces cannot be made here: {error.stderr}") from error

    def _make_host(self, host: int) -> None:
        name, cable = self.name(host), f"gv{self.number}-{host}"
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "link", "set", cable, "master", self.bridge)
        _run("ip", "link", "set", cable, "up")
        _run(*self.prefix(host), "ip", "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _run(*self.prefix(host), "ip", "link", "set", device, "up")


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=30)
