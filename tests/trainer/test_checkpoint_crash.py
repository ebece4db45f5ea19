import errno
import os
from contextlib import contextmanager

import pytest

from cluster.errors import CheckpointError, MissingRanksError
from cluster.storage import Storage
from tests.trainer.checkpoint_job import Job, cut, filled, load
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_layout import committed_steps, latest_step


class RecordingStorage(Storage):
    """Writes down every operation on the files, with what is written or removed."""

    def __init__(self, root):
        super().__init__(root)
        self.operations = []

    def write(self, name, data):
        super().write(name, data)
        if self.operations[-1:] != [("put", name, data)]:
            self.operations.append(("put", name, data))

    @contextmanager
    def open_write(self, name):
        with super().open_write(name) as file:
            yield file
        self.operations.append(("put", name, self.read(name)))

    def rename(self, source, target):
        super().rename(source, target)
        self.operations.append(("rename", source, target))

    def delete(self, name):
        root = self.path("").rstrip("/") + "/"
        paths = self.filesystem.find(self.path(name)) if self.exists(name) else []
        # One file at a time: a crash may come in the middle of a directory.
        self.operations += [("remove", path.removeprefix(root), None) for path in paths]
        super().delete(name)
        if self.is_local:
            self.operations.append(("remove directory", name, None))


def replay(operations, storage: Storage) -> None:
    for kind, name, argument in operations:
        if kind == "put":
            storage.write(name, argument)
        elif kind == "rename":
            storage.rename(name, argument)
        else:
            storage.delete(name)


def record_saves(storage: RecordingStorage) -> list[int]:
    """Saves in a row with retention, a best one, a restart and a repeated step; values count up from 1.

    Returns how many operations had been done when each value's save was over.
    """
    ends = []
    first, second = Job(storage, 2, "first", keep_last=1), None
    for value, step, best in ((1, 10, False), (2, 20, True), (3, 30, False), (4, 30, False), (5, 40, True)):
        if value == 4:
            second = Job(storage, 3, "second", keep_last=1)
        (second or first).save(step, filled(value), best=best)
        ends.append(len(storage.operations))
    return ends


def loaded_value(storage: Storage, step="latest") -> int:
    """The number of the save that is found: all of it, nothing of another."""
    values = {value for tensor in load(storage, step).values() for value in tensor.flatten().tolist()}
    assert len(values) == 1, f"rows of several saves are mixed: {values}"
    return int(values.pop())


def interrupted(operation, is_local: bool):
    """What an operation cut in half can leave on a disk; object stores put a file at once or not at all."""
    kind, name, data = operation
    if kind == "put" and is_local:
        yield ("put", f"{name}.99.tmp", data[: len(data) // 2])
        yield ("put", name, data[: len(data) // 2])


def check_recovery(storage: Storage, least: int, most: int) -> int:
    """A restart finds a save from least..most, and its next save works and leaves nothing else."""
    if latest_step(storage) is None:
        assert least == 0, "a checkpoint was there and is lost"
        with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
            load(storage)
        found = 0
    else:
        found = loaded_value(storage)
        for step in ("best", *committed_steps(storage)):
            loaded_value(storage, step)
    assert least <= found <= most
    job = Job(storage, 1, "third", keep_last=1)
    if found:
        assert loaded_value(storage) == found, "the cleaning at start must not touch what can be loaded"
    job.save(50, filled(9))
    assert loaded_value(storage) == 9
    assert all(
        name in ("LATEST", "BEST") or int(name[5:]) in committed_steps(storage) for name in storage.list()
    )
    return found


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_crash_after_any_operation_leaves_a_loadable_checkpoint(tmp_path, monkeypatch, place):
    # Crashes are played by replaying; waiting for the disk would only take time.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    prefix = "" if place == "local" else "memory://"
    recorder = RecordingStorage(f"{prefix}{tmp_path}/recorded")
    ends, operations = record_saves(recorder), recorder.operations
    assert len(operations) > 50
    least, outcomes = 0, set()
    for count in range(len(operations) + 1):
        most = sum(end < count for end in ends) + 1
        halves = interrupted(operations[count], recorder.is_local) if count < len(operations) else ()
        for variant, last in enumerate((None, *halves)):
            storage = Storage(f"{prefix}{tmp_path}/{count}-{variant}")
            replay([*operations[:count], *([last] if last else [])], storage)
            found = check_recovery(storage, max(least, sum(end <= count for end in ends)), most)
            least = found if last is None else least
            outcomes.add(found)
    assert outcomes == {0, 1, 2, 3, 4, 5}


class FullStorage(Storage):
    """A disk that is full from some point on."""

    full = False

    @contextmanager
    def open_write(self, name):
        with super().open_write(name) as file:
            yield file
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path(name))


@pytest.mark.parametrize("report", ["save", "wait"])
def test_a_full_disk_is_reported_and_the_last_good_checkpoint_stays(tmp_path, report):
    storage = FullStorage(tmp_path)
    checkpointer = Checkpointer(storage, rank=0, world_size=1, attempt="a", keep_last=1)
    save = lambda step: checkpointer.save(step, cut(filled(step), 0, 1), rank_state={}, shared_state={})  # noqa: E731
    save(1)
    checkpointer.wait()
    storage.full = True
    save(2)
    with pytest.raises(CheckpointError, match=r"step 2 could not .*No space left on device.*rank-00000.bin"):
        save(3) if report == "save" else checkpointer.wait()
    assert storage.list() == ["LATEST", "step-00000001"], "the space of the failed save is given back"
    assert loaded_value(storage) == 1
    storage.full = False
    save(4)
    checkpointer.wait()
    assert loaded_value(storage) == 4


def test_a_rank_that_never_writes_is_named(tmp_path):
    storage = Storage(tmp_path)
    lonely = Checkpointer(storage, rank=0, world_size=3, attempt="a", keep_last=1, gather_timeout_s=0.1)
    lonely.save(7, cut(filled(7), 0, 3), rank_state={}, shared_state={})
    with pytest.raises(
        MissingRanksError, match=r"step 7 needs the files of 3 ranks.*rank-00001.json, rank-00002"
    ):
        lonely.wait()
    assert storage.list() == []


def test_files_of_another_attempt_are_never_taken_for_those_of_this_one(tmp_path):
    storage = Storage(tmp_path)
    dead = Checkpointer(storage, rank=1, world_size=2, attempt="dead", keep_last=1)
    dead.save(7, cut(filled(1), 1, 2), rank_state={}, shared_state={})
    dead.wait()
    # Rank 1 alone: rank 0 of the new attempt has not cleaned up yet.
    Checkpointer(storage, rank=1, world_size=2, attempt="alive", keep_last=1)
    assert storage.list() == ["step-00000007.dead.1.tmp"]
    alive = Checkpointer(storage, rank=0, world_size=2, attempt="alive", keep_last=1, gather_timeout_s=0.1)
    assert storage.list() == []
    alive.save(7, cut(filled(2), 0, 2), rank_state={}, shared_state={})
    with pytest.raises(CheckpointError, match=r"rank-00001\.json"):
        alive.wait()


@pytest.mark.parametrize("damage", [None, b"", b"{", b"[]", b'{"step": "20"}', b'{"step": 40}', b"\xff\xfe"])
def test_without_a_usable_latest_the_newest_complete_step_is_taken(tmp_path, caplog, damage):
    storage = Storage(tmp_path)
    job = Job(storage)
    for step in (10, 20):
        job.save(step, filled(step))
    (tmp_path / "step-00000040").mkdir()
    if damage is None:
        storage.delete("LATEST")
    else:
        storage.write("LATEST", damage)
    assert loaded_value(storage) == 20
    assert "LATEST names" in caplog.text and "step 20 is the newest complete one and is used" in caplog.text
