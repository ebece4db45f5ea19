import errno
import json
import os
import pickle

import pytest
import torch

from cluster.errors import CheckpointError, DamagedCheckpointError
from cluster.storage import Storage
from tests.trainer.checkpoint_job import Job, filled, load
from trainer.checkpoint_layout import encode_state
from trainer.checkpoint_reader import CheckpointReader


@pytest.fixture
def folder(tmp_path):
    """The files of one checkpoint of two ranks."""
    Job(Storage(tmp_path), 2).save(5, filled(1.0))
    return tmp_path / "step-00000005"


def read_all(folder):
    return load(Storage(folder.parent))


def test_a_flipped_bit_in_any_byte_of_any_file_is_found(folder):
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for position in range(0, len(good), 1 if path.suffix == ".bin" else 7):
            path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
            with pytest.raises(CheckpointError, match=path.name):
                read_all(folder)
        path.write_bytes(good)
    assert read_all(folder)["table/item"].sum() == 36


@pytest.mark.parametrize("name", ["rank-00001.bin", "rank-00001.json", "state.json"])
def test_a_truncated_file_is_named(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=rf"{name} .*(truncated|damaged).*Use another step"):
        read_all(folder)


@pytest.mark.parametrize("name", ["rank-00001.bin", "rank-00000.json"])
def test_a_missing_rank_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"names 4 files of 2 ranks, but {name} \(1 in all\)"):
        read_all(folder)


def test_a_file_that_disappears_while_reading_is_named(folder):
    reader = CheckpointReader(Storage(folder.parent))
    (folder / "rank-00001.bin").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00001\.bin cannot be read"):
        reader.read_rows("table/item", 0, 9)


@pytest.mark.parametrize(
    ("number", "kind", "advice"),
    [(errno.EIO, DamagedCheckpointError, "Use another step"), (errno.EACCES, CheckpointError, "Try again")],
)
def test_what_a_disk_cannot_read_is_damage_and_what_one_may_not_read_is_none(
    folder, monkeypatch, number, kind, advice
):
    def fail(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    reader = CheckpointReader(Storage(folder.parent))
    monkeypatch.setattr(Storage, "read", fail)
    with pytest.raises(CheckpointError, match=rf"\.bin cannot be read: .*{advice}") as error:
        reader.read_rows("table/item", 0, 9)
    assert error.type is kind


def test_only_the_blocks_that_are_read_are_checked(folder):
    (folder / "rank-00001.bin").write_bytes(bytes(len((folder / "rank-00001.bin").read_bytes())))
    reader = CheckpointReader(Storage(folder.parent))
    assert torch.equal(reader.read_rows("table/item", 0, 2), torch.ones(2, 4))
    with pytest.raises(
        CheckpointError, match=r"rank-00001\.bin does not match its checksum in bytes 0\.\.112"
    ):
        reader.read_rows("table/item", 0, 3)


def test_an_unknown_format_version_is_refused(folder):
    state = json.loads((folder / "state.json").read_text())
    del state["crc32"]
    for version, advice in ((7, "Use the version of grail that wrote it"), (0, "an older one that nothing")):
        (folder / "state.json").write_bytes(encode_state({**state, "format_version": version}))
        message = rf"has format version {version}; this program knows version 1\. {advice}"
        with pytest.raises(CheckpointError, match=message) as refused:
            read_all(folder)
        assert not isinstance(refused.value, DamagedCheckpointError), "no reason to take an older checkpoint"


@pytest.mark.parametrize("text", ["[1, 2]", "{}"])
def test_a_state_without_a_format_version_is_a_reason_to_take_an_older_checkpoint(folder, text):
    (folder / "state.json").write_text(text)
    with pytest.raises(DamagedCheckpointError, match="damaged, or no grail checkpoint"):
        read_all(folder)


def test_tensors_that_are_missing_or_of_another_shape_are_refused(folder):
    reader = CheckpointReader(Storage(folder.parent))
    with pytest.raises(
        CheckpointError, match="holds no tensor 'table/user'; it has dense/weight, table/item"
    ):
        reader.read_rows("table/user", 0, 1)
    for tensor in (torch.empty(9, 5), torch.empty(9), torch.empty(9, 4, dtype=torch.float64)):
        with pytest.raises(
            CheckpointError, match=r"holds table/item as \[9, 4\] torch.float32; it cannot fill"
        ):
            reader.read_into("table/item", 0, tensor)
    with pytest.raises(CheckpointError, match=r"holds 9 rows of table/item, but 5\.\.14 were asked for"):
        reader.read_into("table/item", 5, torch.empty(9, 4))


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(folder):
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint of step 6; it has \[5\]"):
        CheckpointReader(Storage(folder.parent), 6)
    with pytest.raises(CheckpointError, match="'lastest' names no checkpoint; give latest, best or a step"):
        CheckpointReader(Storage(folder.parent), "lastest")
    assert CheckpointReader(Storage(folder.parent), "5").step == 5


class Hostile:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize(
    "name", [".metadata", "rank-00000.bin", "rank-00000.json", "state.json", "../LATEST"]
)
def test_a_hostile_pickle_never_runs(folder, tmp_path, name):
    mark = tmp_path / "mark"
    data = pickle.dumps(Hostile(mark))
    pickle.loads(data).close()
    assert mark.exists(), "the pickle is harmless, so the test shows nothing"
    mark.unlink()
    (folder / name).write_bytes(data)
    if name in (".metadata", "../LATEST"):
        assert read_all(folder)["table/item"].sum() == 36
    else:
        with pytest.raises(CheckpointError, match=name):
            read_all(folder)
    assert not mark.exists()


def test_a_hostile_state_cannot_lead_out_of_its_folder(folder, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_bytes((folder / "rank-00000.json").read_bytes())
    state = json.loads((folder / "state.json").read_text())
    del state["crc32"]
    state["ranks"][0]["index"] = "../secret.json"
    (folder / "state.json").write_bytes(encode_state(state))
    with pytest.raises(CheckpointError, match=r"\.\./secret\.json \(1 in all\) cannot be found"):
        read_all(folder)
