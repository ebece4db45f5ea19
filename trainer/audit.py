"""Which users each step's loss saw: written by the training loop itself, read back to prove that none was lost.

Each rank keeps its steps in memory and writes them as one file right before a checkpoint, so that the files never
know less than the checkpoints. Steps that a later start of the job took again are void.
"""

import json
from collections.abc import Sequence

from cluster.storage import Storage

DIRECTORY = "audit"


class AuditLog:
    """One rank's record of one start (attempt) of the job."""

    def __init__(self, storage: Storage, *, attempt: str, rank: int, first_step: int, enabled: bool):
        self.storage, self.attempt, self.rank, self.enabled = storage, attempt, rank, enabled
        self.first_step = first_step
        self.entries: list[dict] = []

    def record(self, step: int, epoch: int, users: Sequence[int]) -> None:
        """Keep the users of an optimizer step that was taken."""
        if self.enabled:
            self.entries.append({"step": step, "epoch": epoch, "users": list(users)})

    def flush(self) -> None:
        """Write what was recorded since the last flush."""
        if not self.entries:
            return
        last = self.entries[-1]["step"]
        name = f"{DIRECTORY}/{self.attempt}.rank-{self.rank:05d}.steps-{self.first_step:08d}-{last:08d}.json"
        self.storage.write(name, json.dumps(self.entries).encode())
        self.entries, self.first_step = [], last + 1


def next_attempt(storage: Storage) -> int:
    """A number above that of every earlier start that trained."""
    numbers = [int(name.split("-", 1)[0]) for name in storage.list(DIRECTORY)]
    return max(numbers, default=0) + 1


def read_audit(storage: Storage) -> dict[int, list[int]]:
    """Epoch -> users whose loss counts, in the order of steps; void steps left out.

    An attempt's first step tells where it went on: what earlier attempts did from there on is void.
    """
    attempts: dict[str, list[dict]] = {}
    for name in storage.list(DIRECTORY):
        if not name.endswith(".json"):
            continue  # the temporary file of a process that was killed while writing
        entries = json.loads(storage.read(f"{DIRECTORY}/{name}"))
        attempts.setdefault(name.split(".", 1)[0], []).extend(entries)
    valid: list[dict] = []
    for _, entries in sorted(attempts.items()):
        first = min(entry["step"] for entry in entries)
        valid = [entry for entry in valid if entry["step"] < first] + entries
    users: dict[int, list[int]] = {}
    for entry in sorted(valid, key=lambda entry: entry["step"]):
        users.setdefault(entry["epoch"], []).extend(entry["users"])
    return users
