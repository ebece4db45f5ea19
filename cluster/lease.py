"""A lease on a run directory: one job at a time writes to it, on a local disk as well as in an object store.

The lease is a small file that its holder keeps fresh. Whoever finds one either knows that its holder is gone (a
process of this machine that no longer runs) or watches it for some time: one that stays as it is belongs to a dead
job and is taken over. Only changes count, never clocks, so a clock that jumps cannot break a lease.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, LeaseLostError
from cluster.storage import Storage

LEASE_NAME = "lease.json"
BEAT_S = 5.0
MISSED_BEATS = 4
_SETTLE_HERE_S = 0.5

logger = logging.getLogger(__name__)


class Lease:
    """Held between entering and leaving; `on_lost` is called with the reason if another job has taken it.

    Raises: ClusterError on entering if another job that lives holds it.
    """

    def __init__(self, run_dir: str, on_lost: Callable[[LeaseLostError], None], *, beat_s: float = BEAT_S):
        self._storage, self._on_lost, self._beat_s = Storage(run_dir), on_lost, beat_s
        self._token, self._beats = secrets.token_hex(8), 0
        self._ended = threading.Event()

    def __enter__(self) -> "Lease":
        self._storage.make_directory()
        if not self._create():
            self._take_over()
        self._thread = threading.Thread(target=self._keep_fresh, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if _is_held_by(read_lease(self._storage), self._token):
            with suppress(OSError):
                self._storage.delete(LEASE_NAME)

    def _create(self) -> bool:
        try:
            self._storage.create(LEASE_NAME, self._content())
        except FileExistsError:
            return False
        return True

    def _take_over(self) -> None:
        """Wait until the lease there is shows no sign of life, then put one's own in its place."""
        found = read_lease(self._storage)
        if found is None:
            if self._create():
                return
            found = read_lease(self._storage)
        alive = None if found is None else lives_here(found)
        if alive or (alive is None and self._shows_life(found)):
            raise ClusterError(_refusal(self._storage, found))
        logger.info("%s was left by a job that is gone; taking it over", self._storage.path(LEASE_NAME))
        self._storage.write(LEASE_NAME, self._content())
        # Another job may have done the same at this moment: the one whose lease stays has it.
        time.sleep(min(self._beat_s, _SETTLE_HERE_S) if alive is False else self._beat_s)
        if not _is_held_by(now := read_lease(self._storage), self._token):
            raise ClusterError(_refusal(self._storage, now))

    def _shows_life(self, found: dict[str, Any] | None) -> bool:
        before = (found, self._storage.modified_ns(LEASE_NAME))
        patience_s = MISSED_BEATS * self._beat_s
        logger.info(
            "%s is there, of a job on another machine; watching for %.0f s whether that one lives",
            *(self._storage.path(LEASE_NAME), patience_s),
        )
        until = time.monotonic() + patience_s
        while time.monotonic() < until:
            time.sleep(self._beat_s / 4)
            now = read_lease(self._storage)
            if now is None:
                return False
            if (now, self._storage.modified_ns(LEASE_NAME)) != before:
                return True
        return False

    def _keep_fresh(self) -> None:
        while not self._ended.wait(self._beat_s):
            try:
                found = read_lease(self._storage)
                if found is not None and not _is_held_by(found, self._token):
                    self._on_lost(LeaseLostError(_refusal(self._storage, found)))
                    return
                self._beats += 1
                self._storage.touch(LEASE_NAME, self._content())
            except OSError as error:
                logger.warning("%s cannot be kept fresh: %s", self._storage.path(LEASE_NAME), error)

    def _content(self) -> bytes:
        content = {
            "token": self._token,
            "beats": self._beats,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _started_at(os.getpid()),
        }
        return json.dumps(content).encode()


def read_lease(storage: Storage) -> dict[str, Any] | None:
    """The content of a lease; None where there is none, or one that a dying job wrote half."""
    try:
        content = json.loads(storage.read(LEASE_NAME))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def lives_here(lease: dict[str, Any]) -> bool | None:
    """Whether the holder runs; None where it is not of this machine, so that one cannot know."""
    if lease.get("machine") != _machine() or lease.get("started") is None:
        return None
    return _started_at(lease["pid"]) == lease["started"]


def _is_held_by(lease: dict[str, Any] | None, token: str) -> bool:
    return lease is not None and lease.get("token") == token


def _refusal(storage: Storage, lease: dict[str, Any] | None) -> str:
    holder = "another job" if lease is None else f"process {lease.get('pid')} on {lease.get('host')}"
    return (
        f"one job at a time may write to {storage.root}, and {holder} does; stop that one, wait for its end, or "
        "name another --run-dir"
    )


def _machine() -> str:
    """Processes can see each other where this is the same: one boot of one machine, one space of process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.is_file():
        return socket.gethostname()
    return f"{socket.gethostname()} {boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _started_at(pid: int) -> int | None:
    """When a process began, in ticks since the machine did, which no change of a clock touches.

    None if it is gone, and on systems without /proc.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    is_zombie = fields[0] == "Z"
    return None if is_zombie else int(fields[19])
