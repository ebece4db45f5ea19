"""Numbers of policies: every start of a run has a range of its own, so that no number is ever used twice."""

import json

from cluster.process import Process
from cluster.storage import Storage
from sharding.collectives import broadcast_json

STARTS = "policy_starts.json"
_STEPS = 1 << 32


def new_start(storage: Storage, process: Process) -> int:
    """The number of this start, written down before any policy of it exists; a collective call."""
    start = None
    if process.rank == 0:
        last = json.loads(storage.read(STARTS))["starts"] if storage.exists(STARTS) else 0
        start = last + 1
        storage.write(STARTS, json.dumps({"starts": start}).encode())
    return broadcast_json(start, process)


def version_of(start: int, step: int) -> int:
    """The policy after `step` updates, as this start knows it."""
    return start * _STEPS + step


def age(version: int, now: int) -> int | None:
    """Updates between the policy that drew and the one of now; None for a policy that was lost with another start."""
    return now - version if version // _STEPS == now // _STEPS else None
