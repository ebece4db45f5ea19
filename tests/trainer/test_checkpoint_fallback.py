"""A run whose newest checkpoint is damaged goes on from the one before, on all ranks, with nothing lost."""

import shutil

import pytest

from cluster.errors import DamagedCheckpointError
from cluster.storage import Storage
from tests.process_group import run_on_processes
from tests.tiny_run import NUM_USERS, assert_same_state, build_tiny_data, run, tiny_config, with_train
from trainer.audit import read_audit


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_tiny_data(tmp_path_factory.mktemp("data"))


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def fail_to_run(process, config):
    try:
        run(process, config)
    except DamagedCheckpointError as error:
        return str(error)
    return "no error"


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one_and_the_result_is_the_same(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", checkpoint_every_steps=2)
    (expected, state), *_ = run_on_processes(run, 2, config)
    stopped = tiny_config(data, tmp_path / "stopped", checkpoint_every_steps=2)
    (first, _), *_ = run_on_processes(run, 2, stopped, 5)
    folder = tmp_path / "stopped" / "checkpoints"
    newest = sorted(path.name for path in folder.glob("step-*"))[-1]
    assert int(newest[5:]) == first["step"]
    shutil.copytree(folder, tmp_path / "copy")
    flip(folder / newest / "rank-00001.bin")
    (result, same), *_ = run_on_processes(run, 2, stopped)
    assert {**result, "best": pytest.approx(result["best"])} == expected
    assert_same_state(same, state, tolerance=0)
    for epoch, users in read_audit(Storage(stopped.run_dir)).items():
        assert sorted(users) == list(range(NUM_USERS)), f"epoch {epoch}"

    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)
    for path in folder.glob("step-*/rank-00000.bin"):
        path.unlink()
    (message, other) = run_on_processes(fail_to_run, 2, with_train(stopped, epochs=3))
    assert message == other
    assert "rank-00000.bin" in message and "No older checkpoint is left" in message
