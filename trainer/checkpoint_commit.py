"""Rank 0's part of a checkpoint: wait for all ranks, make it the latest one at once, remove old ones."""

import json
import logging
import re
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import MissingRanksError
from cluster.storage import Storage
from trainer.checkpoint_layout import (
    FORMAT_VERSION,
    REPLACED,
    STATE,
    best_step,
    committed_directories,
    committed_steps,
    directory_step,
    encode_state,
    index_tensors,
    is_committed,
    latest_step,
    step_directory,
)
from trainer.checkpoint_pointers import BEST, LATEST, write_pointer

_UNIQUE_NAME = re.compile(r"rank-\d+\.([^.]+)\.(\d+)\.(?:bin|json)")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SaveTarget:
    """Where the files of one save go until it is committed.

    On a local disk that is a directory of its own, renamed at the end. Object stores cannot rename: there the
    files go to their final place under names no other save uses, and `state.json` is written last.
    """

    step: int
    directory: str
    suffix: str
    attempt: str
    sequence: int

    @staticmethod
    def of(storage: Storage, step: int, attempt: str, sequence: int) -> "SaveTarget":
        final, unique = step_directory(step), f".{attempt}.{sequence}"
        directory, suffix = (f"{final}{unique}.tmp", "") if storage.is_local else (final, unique)
        return SaveTarget(step=step, directory=directory, suffix=suffix, attempt=attempt, sequence=sequence)

    def bin_name(self, rank: int) -> str:
        return f"rank-{rank:05d}{self.suffix}.bin"

    def index_name(self, rank: int) -> str:
        return f"rank-{rank:05d}{self.suffix}.json"


def commit(
    storage: Storage,
    target: SaveTarget,
    *,
    world_size: int,
    shared_state: Mapping[str, Any],
    best: bool,
    timeout_s: float,
) -> None:
    """Turn what the ranks wrote into the latest checkpoint.

    A crash at any point leaves either the checkpoints of before or this one. LATEST is moved last: until then
    a restarted job goes on from the older step, which is still there.
    """
    names = [target.index_name(rank) for rank in range(world_size)]
    _wait_for_files(storage, target, names, timeout_s)
    indexes = [storage.read(f"{target.directory}/{name}") for name in names]
    documents = [json.loads(data) for data in indexes]
    index_tensors(documents)
    state = {
        "format_version": FORMAT_VERSION,
        "step": target.step,
        "world_size": world_size,
        "ranks": [
            {
                "index": name,
                "index_bytes": len(data),
                "index_crc32": zlib.crc32(data),
                "bin": document["bin"],
                "bin_bytes": document["bin_bytes"],
            }
            for name, data, document in zip(names, indexes, documents, strict=True)
        ],
        "shared_state": shared_state,
    }
    storage.write(f"{target.directory}/{STATE}", encode_state(state))
    if storage.is_local:
        _replace_directory(storage, target.directory, step_directory(target.step))
    else:
        _remove_earlier_saves(storage, target)
    if best:
        write_pointer(storage, BEST, target.step)
    write_pointer(storage, LATEST, target.step)


def _wait_for_files(storage: Storage, target: SaveTarget, names: list[str], timeout_s: float) -> None:
    deadline, pause_s = time.monotonic() + timeout_s, 0.02
    while missing := set(names) - set(storage.list(target.directory)):
        if time.monotonic() > deadline:
            raise MissingRanksError(
                f"the checkpoint of step {target.step} needs the files of {len(names)} ranks, but after "
                f"{timeout_s:.0f} s {len(missing)} are missing in {storage.path(target.directory)}: "
                f"{', '.join(sorted(missing)[:5])}. Look for errors of those ranks in the log."
            )
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 2.0)


def _replace_directory(storage: Storage, source: str, final: str) -> None:
    """Rename `source` to `final`; an older checkpoint of that step stays until the new one is there."""
    replaced = final + REPLACED
    if is_committed(storage, final):
        _remove_directory(storage, replaced)
        storage.rename(final, replaced)
    else:
        storage.delete(final)
    storage.rename(source, final)
    _remove_directory(storage, replaced)


def _remove_earlier_saves(storage: Storage, target: SaveTarget) -> None:
    """Drop the files of earlier saves of the same step, which its `state.json` no longer names."""
    for name in storage.list(target.directory):
        match = _UNIQUE_NAME.fullmatch(name)
        # Another rank may already be writing the next save of this step: its files stay.
        if match and (match[1] != target.attempt or int(match[2]) < target.sequence):
            storage.delete(f"{target.directory}/{name}")


def _remove_directory(storage: Storage, directory: str) -> None:
    # The mark of completeness goes first: what is deleted half-way is never taken for a checkpoint.
    storage.delete(f"{directory}/{STATE}")
    storage.delete(directory)


def remove_old_steps(storage: Storage, step: int, keep_last: int) -> None:
    """Keep the last checkpoints up to `step` and those LATEST and BEST name.

    Steps beyond `step` come from before a restart at an older checkpoint; they are void and removed as well.
    """
    past = [old for old in committed_steps(storage) if old <= step]
    kept = {*past[-keep_last:], latest_step(storage), best_step(storage)}
    for old, directory in committed_directories(storage).items():
        if old not in kept:
            _remove_directory(storage, directory)
            logger.debug("Removed the checkpoint of step %d.", old)


def remove_leftovers(storage: Storage, attempt: str) -> None:
    """Remove what interrupted saves and deletions of earlier attempts left behind."""
    committed = set(committed_directories(storage).values())
    for name in storage.list():
        unfinished = name.endswith(".tmp") or (directory_step(name) is not None and name not in committed)
        own = f".{attempt}." in name or any(f".{attempt}." in file for file in storage.list(name))
        if unfinished and not own:
            logger.info("Removing %s, left by an interrupted checkpoint.", storage.path(name))
            _remove_directory(storage, name)
