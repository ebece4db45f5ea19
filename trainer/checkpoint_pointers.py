"""The small files beside a run's checkpoints that name one of their steps; read without anything slow."""

import json

from cluster.storage import Storage

LATEST, BEST = "LATEST", "BEST"


def read_pointer(storage: Storage, name: str) -> int | None:
    """The step in LATEST or BEST; None where the file is missing or damaged."""
    if not storage.exists(name):
        return None
    try:
        step = json.loads(storage.read(name))["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def write_pointer(storage: Storage, name: str, step: int) -> None:
    storage.write(name, json.dumps({"step": step}).encode())
