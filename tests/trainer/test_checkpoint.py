import threading
import time
from contextlib import contextmanager

import pytest
import torch

from cluster.errors import CheckpointError, ConfigError
from cluster.storage import Storage
from sharding.state import Piece
from tests.trainer.checkpoint_job import Job, cut, filled, load
from trainer import checkpoint
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_layout import DTYPES, best_step, committed_steps, latest_step
from trainer.checkpoint_reader import CheckpointReader


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path) -> Storage:
    """A folder on disk and an object store."""
    return Storage(tmp_path if request.param == "local" else f"memory://{tmp_path}")


def random_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "table/item": torch.randn(37, 5, generator=generator),
        "table_state/item": torch.rand(37, generator=generator),
        "dense/weight": torch.randn(101, generator=generator),
        "dense/empty": torch.empty(0),
        "adam/step": torch.tensor(12.0),
    }


def assert_equal_states(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype and found[name].shape == wanted[name].shape, name
        assert torch.equal(found[name], wanted[name]), name


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_state_comes_back_as_it_was_saved(storage, world_size):
    state = random_state()
    Job(storage, world_size).save(100, state, epoch=2)
    assert_equal_states(load(storage), state)
    reader = CheckpointReader(storage, 100)
    assert (reader.step, reader.world_size, reader.shared_state) == (
        100,
        world_size,
        {"step": 100, "epoch": 2},
    )
    assert reader.rank_states == [{"rank": rank, "stream": 10 * rank + 100} for rank in range(world_size)]


def test_a_state_moves_from_two_ranks_to_one_to_three(storage):
    state = random_state()
    Job(storage, 2).save(1, state)
    Job(storage, 1, "second").save(2, load(storage))
    reader = CheckpointReader(storage)
    pieces = [piece for rank in range(3) for piece in cut(state, rank, 3)]
    for piece in pieces:
        rows = torch.empty_like(piece.tensor)
        reader.read_into(piece.name, piece.start, rows)
        assert torch.equal(rows, piece.tensor), piece.name
    Job(storage, 3, "third").save(3, load(storage))
    assert_equal_states(load(storage), state)


def test_any_range_of_rows_can_be_read_across_blocks_and_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 24)
    storage, table = Storage(tmp_path), torch.arange(35.0).reshape(7, 5)
    Job(storage, 2).save(1, {"table/item": table})
    reader = CheckpointReader(storage)
    for start in range(8):
        for stop in range(start, 8):
            assert torch.equal(reader.read_rows("table/item", start, stop), table[start:stop])


def test_rows_can_be_read_into_a_strided_parameter(tmp_path):
    storage, table = Storage(tmp_path), torch.arange(12.0).reshape(4, 3)
    Job(storage).save(1, {"table/item": table})
    parameter = torch.nn.Parameter(torch.zeros(3, 2)).T
    reader = CheckpointReader(storage)
    reader.read_into("table/item", 1, parameter)
    assert torch.equal(parameter, table[1:3])


@pytest.mark.parametrize("name", DTYPES)
def test_every_type_keeps_its_bits(tmp_path, name):
    storage, dtype = Storage(tmp_path), DTYPES[name]
    raw = torch.arange(16 * dtype.itemsize, dtype=torch.uint8) % (2 if dtype == torch.bool else 251)
    Job(storage).save(1, {"dense/weight": raw.view(dtype)})
    found = load(storage)["dense/weight"]
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8), raw)


def test_noncontiguous_tensors_are_saved_by_value(tmp_path):
    storage, matrix = Storage(tmp_path), torch.arange(12.0).reshape(3, 4)
    Job(storage).save(1, {"dense/weight": matrix.T})
    assert torch.equal(load(storage)["dense/weight"], matrix.T)


class SlowStorage(Storage):
    """Holds every bin file back until it is released."""

    def __init__(self, root):
        super().__init__(root)
        self.released = threading.Event()

    @contextmanager
    def open_write(self, name):
        if name.endswith(".bin"):
            assert self.released.wait(20)
        with super().open_write(name) as file:
            yield file


def test_training_goes_on_while_the_old_values_are_written(tmp_path):
    storage, state, counters, complete = SlowStorage(tmp_path), filled(1.0), {"users": 5}, []
    checkpointer = Checkpointer(
        storage, rank=0, world_size=1, attempt="a", keep_last=2, on_commit=complete.append
    )
    checkpointer.save(1, cut(state, 0, 1), rank_state={}, shared_state=counters)
    state["table/item"].fill_(2.0)
    counters["users"] = 6
    assert committed_steps(storage) == complete == []
    storage.released.set()
    checkpointer.wait()
    assert complete == [1]
    assert_equal_states(load(storage), filled(1.0))
    assert CheckpointReader(storage).shared_state == {"users": 5}


def test_a_save_waits_for_the_one_before_and_says_so(tmp_path, caplog):
    storage = SlowStorage(tmp_path)
    checkpointer = Checkpointer(storage, rank=0, world_size=1, attempt="a", keep_last=2)
    for step in (1, 2):
        threading.Timer(0.2, storage.released.set).start()
        checkpointer.save(step, cut(filled(step), 0, 1), rank_state={}, shared_state={})
    checkpointer.close()
    assert "Step 2 waited 0." in caplog.text
    assert_equal_states(load(storage, 1), filled(1))
    assert_equal_states(load(storage, 2), filled(2))


def test_staging_memory_is_reused_from_save_to_save(tmp_path):
    checkpointer = Checkpointer(Storage(tmp_path), rank=0, world_size=1, attempt="a", keep_last=2)
    addresses = lambda: [buffer.data_ptr() for buffer in checkpointer._buffers.values()]  # noqa: E731
    checkpointer.prepare(cut(filled(0), 0, 1))
    prepared = addresses()
    for step in (1, 2):
        checkpointer.save(step, cut(filled(step), 0, 1), rank_state={}, shared_state={})
        assert addresses() == prepared
    checkpointer.wait()
    assert_equal_states(load(Storage(tmp_path)), filled(2))


def test_rank_zero_commits_when_the_last_rank_is_done(tmp_path):
    storage = Storage(tmp_path)
    ranks = [Checkpointer(storage, rank=r, world_size=2, attempt="a", keep_last=2) for r in range(2)]
    ranks[0].save(1, cut(filled(1), 0, 2), rank_state={}, shared_state={})
    time.sleep(0.1)
    assert committed_steps(storage) == []
    ranks[1].save(1, cut(filled(1), 1, 2), rank_state={}, shared_state={})
    for rank in ranks:
        rank.wait()
    assert_equal_states(load(storage), filled(1))


def test_the_last_and_the_best_checkpoints_are_kept(storage):
    job = Job(storage, 2, keep_last=2)
    for step in range(1, 7):
        job.save(step, filled(step), best=step == 2)
    assert (committed_steps(storage), latest_step(storage), best_step(storage)) == ([2, 5, 6], 6, 2)
    assert_equal_states(load(storage, "best"), filled(2))
    job.save(7, filled(7), best=True)
    assert (committed_steps(storage), best_step(storage)) == ([6, 7], 7)
    names = {"BEST", "LATEST", "step-00000006", "step-00000007"}
    assert set(storage.list()) == names, "nothing else may be left"


def test_without_a_best_checkpoint_the_latest_stands_in(tmp_path, caplog):
    storage = Storage(tmp_path)
    Job(storage).save(4, filled(4))
    assert CheckpointReader(storage, "best").step == 4
    assert "marked as best" in caplog.text


def test_a_step_saved_again_after_a_restart_is_replaced(storage):
    Job(storage, 2, "first").save(10, filled(1))
    job = Job(storage, 3, "second", keep_last=1)
    job.save(10, filled(2))
    job.save(10, filled(3))
    assert_equal_states(load(storage), filled(3))
    assert storage.list() == ["LATEST", "step-00000010"]
    assert len(storage.list("step-00000010")) == 7, "three bins, three indexes and state.json"


def test_steps_beyond_the_one_a_restart_began_from_are_void(storage):
    first = Job(storage, keep_last=5)
    for step in (10, 20, 30):
        first.save(step, filled(step))
    Job(storage, attempt="second", keep_last=5).save(15, filled(15))
    assert (committed_steps(storage), latest_step(storage)) == ([10, 15], 15)


def test_pieces_that_leave_a_gap_or_overlap_are_refused_and_nothing_is_committed(storage):
    table = torch.zeros(4, 2)
    for start, problem in ((1, "no rank wrote rows 0..1"), (0, "no rank wrote rows 3..4")):
        piece = Piece(name="table/item", start=start, global_shape=(4, 2), tensor=table[:3])
        checkpointer = Checkpointer(storage, rank=0, world_size=1, attempt="a", keep_last=1)
        checkpointer.save(1, [piece], rank_state={}, shared_state={})
        with pytest.raises(CheckpointError, match=f"{problem} of table/item"):
            checkpointer.wait()
    pieces = [Piece(name="x", start=start, global_shape=(4, 2), tensor=table[:3]) for start in (0, 1)]
    checkpointer.save(2, pieces, rank_state={}, shared_state={})
    with pytest.raises(CheckpointError, match=r"two ranks wrote rows 1\.\.3 of x"):
        checkpointer.wait()
    assert committed_steps(storage) == []


def test_pieces_that_do_not_fit_their_tensor_are_refused_at_once(tmp_path):
    checkpointer = Checkpointer(Storage(tmp_path), rank=0, world_size=1, attempt="a", keep_last=1)
    good = Piece(name="x", start=0, global_shape=(4, 2), tensor=torch.zeros(4, 2))
    wide = Piece(name="x", start=0, global_shape=(4, 2), tensor=torch.zeros(4, 3))
    late = Piece(name="x", start=3, global_shape=(4, 2), tensor=torch.zeros(2, 2))
    for pieces, message in (
        ([wide], r"rows 0..4 of x with shape \[4, 3\] are no part of its global shape \[4, 2\]"),
        ([late], r"rows 3..5 of x"),
        ([good, good], "rank 0 gave the same rows of a tensor twice"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpointer.save(1, pieces, rank_state={}, shared_state={})
    with pytest.raises(CheckpointError, match="shared_state must hold plain JSON values"):
        checkpointer.save(1, [good], rank_state={}, shared_state={"generator": torch.Generator()})


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.keep-last must be at least 1, got 0"):
        Checkpointer(Storage(tmp_path), rank=0, world_size=1, attempt="a", keep_last=0)
    with pytest.raises(ConfigError, match=r"letters, digits, _ and - only, given 'a/b'"):
        Checkpointer(Storage(tmp_path), rank=0, world_size=1, attempt="a/b", keep_last=1)
