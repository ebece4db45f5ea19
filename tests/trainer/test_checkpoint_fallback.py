"""A run whose newest checkpoint is damaged goes on from the one before, on all ranks, with nothing lost."""

import shutil

import pytest

from cluster.errors import DamagedCheckpointError
from cluster.reporter import Reporter
from cluster.storage import Storage
from tests.process_group import ALONE, run_on_processes
from tests.tiny_run import NUM_USERS, assert_same_state, build_tiny_data, run, tiny_config, with_train
from trainer import checkpoint_fallback
from trainer.audit import read_audit
from trainer.checkpoint_fallback import void_later_best
from trainer.checkpoint_layout import best_step, committed_steps
from trainer.checkpoint_pointers import BEST, write_pointer
from trainer.run_state import Progress
from trainer.start import start_job


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


def begin(process, config):
    progress = start_job(process, config, {}, Reporter(process.rank)).progress
    return progress.step, progress.best, progress.best_step


def test_the_best_checkpoint_is_none_of_those_that_will_be_done_again(data, tmp_path):
    """It may be the damaged one itself, and served until another is better."""
    config = tiny_config(
        data, tmp_path / "run", checkpoint_every_steps=2, validate_every_steps=2, keep_last=9
    )
    run_on_processes(run, 2, config, 5)
    folder = tmp_path / "run" / "checkpoints"
    checkpoints = Storage(folder)
    *_, first, newest = committed_steps(checkpoints)
    write_pointer(checkpoints, BEST, newest)
    flip(folder / f"step-{newest:08d}" / "rank-00001.bin")
    (step, best, of_step), other = run_on_processes(begin, 2, config)
    assert (step, best, of_step) == other and step == first
    assert best_step(checkpoints) == of_step is not None and of_step <= first


def test_where_the_best_until_then_is_gone_the_next_validation_is_the_first_one(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_fallback, "agree_on", lambda number, process: number)
    checkpoints = Storage(tmp_path)
    for step in (4, 6):
        checkpoints.write(f"step-{step:08d}/state.json", b"{}")
    write_pointer(checkpoints, BEST, 6)
    progress = Progress(step=4, best=0.5, best_step=2, validations_without_gain=1)
    void_later_best(checkpoints, progress, ALONE)
    assert (progress.best, progress.best_step, progress.validations_without_gain) == (None, None, 0)
    assert not checkpoints.exists(BEST)

    write_pointer(checkpoints, BEST, 4)
    progress = Progress(step=6, best=0.5, best_step=4)
    void_later_best(checkpoints, progress, ALONE)
    assert (progress.best_step, best_step(checkpoints)) == (4, 4)

    write_pointer(checkpoints, BEST, 8)  # which is not even complete any more
    void_later_best(checkpoints, progress, ALONE)
    assert (progress.best_step, best_step(checkpoints)) == (4, 4)
