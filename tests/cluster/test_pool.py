import errno
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, OutOfMemoryError

from cluster.configuration import ClusterConfig
from cluster.errors import ClusterError, DataError, PoolGoneError, StorageError
from cluster.pool import Pool
from cluster.shared_object import SharedObject
from cluster.tasks import run_tasks

TWO = ClusterConfig(workers=2, start_timeout_s=60)


def _build_squarer(marker: str):
    def square(item: int) -> tuple[int, int]:
        if item == 5 and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item, os.getpid()

    return square


def _build_halting(marker: str):
    def square(item: int) -> int:
        if item == 2 and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return item * item

    return square


def _build_deadly():
    return lambda item: os.kill(os.getpid(), signal.SIGKILL)


def _build_mortal(marker: str):
    """A member cannot live while the marker is there."""
    if Path(marker).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return lambda item: (time.sleep(0.3), item)[1]


def _build_dividing():
    def divide(item: int) -> float:
        return 1 / item

    return divide


def _build_nothing():
    raise DataError("there is nothing to build from; make some")


def _double(number: int) -> int:
    if number == 13:
        raise DataError("13 is not allowed; leave it out")
    return 2 * number


def _fill_disk(name: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


def _die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_pool_finishes_every_item_though_a_member_is_killed(tmp_path, caplog):
    with Pool(_build_squarer, str(tmp_path / "marker"), members=2, cluster=TWO) as pool:
        answers = dict(pool.map(range(10)))
    assert {index: square for index, (square, _) in answers.items()} == {n: n * n for n in range(10)}
    assert "died with item 5" in caplog.text and pool.deaths == 1
    assert len({pid for _, pid in answers.values()}) <= 3


def test_a_member_that_hangs_is_replaced_and_its_item_given_to_another(tmp_path, caplog):
    with Pool(
        _build_halting, str(tmp_path / "marker"), members=2, cluster=TWO, item_timeout_s=2, name="reward pool"
    ) as pool:
        assert dict(pool.map(range(5))) == {n: n * n for n in range(5)}
    assert "of the reward pool has had item 2 for 2 s; it hangs" in caplog.text and pool.deaths == 1
    assert "died with item 2: it took more than 2 s; replacing it" in caplog.text


def test_an_item_that_kills_every_member_ends_the_pool_with_its_number():
    with (
        pytest.raises(ClusterError, match=r"3 have died, 3 of them with item 0"),
        Pool(_build_deadly, members=1, cluster=TWO) as pool,
    ):
        list(pool.map(["poison"]))


def test_an_error_in_a_member_tells_where_it_happened():
    with (
        pytest.raises(ZeroDivisionError) as error,
        Pool(_build_dividing, members=1, cluster=TWO) as pool,
    ):
        list(pool.map([0]))
    assert "return 1 / item" in str(error.value.__cause__)


def test_what_does_not_reach_a_member_in_time_is_told_of(monkeypatch):
    def wait_in_vain(reference: object, *, timeout: float) -> None:
        raise GetTimeoutError("Get timed out: some object(s) not ready.")

    monkeypatch.setattr("cluster.shared_object.ray.get", wait_in_vain)
    with pytest.raises(ClusterError, match="must reach the others within 60 s, and did not"):
        SharedObject(reference=None).get(60.0)


def test_members_that_died_while_they_had_nothing_to_do_are_not_laid_to_the_next_item(tmp_path):
    with Pool(_build_squarer, str(tmp_path), members=3, cluster=TWO, cpus_per_member=0.1) as pool:
        pool.wait_for_all(60)
        pids = pool.pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            time.sleep(0.05)
        ticket = pool.submit(7)
        ((found, (square, _)),) = pool.poll(timeout_s=60)
    assert (found, square) == (ticket, 49)


def test_an_item_goes_past_a_member_that_hangs_to_one_that_answers(tmp_path):
    with Pool(_build_squarer, str(tmp_path), members=2, cluster=TWO) as pool:
        pool.wait_for_all(60)
        halted = pool.slots[-1].pid if pool._idle[-1] is pool.slots[-1] else pool._idle[-1].pid
        os.kill(halted, signal.SIGSTOP)
        pool.submit(7)
        ((_, (square, pid)),) = pool.poll(timeout_s=30)
        assert square == 49 and pid != halted and pool.deaths == 0


def test_all_members_may_die_idle_and_one_more_with_an_item(tmp_path):
    marker = tmp_path / "marker"
    with Pool(_build_squarer, str(marker), members=3, cluster=TWO, cpus_per_member=0.1, max_deaths=2) as pool:
        pool.wait_for_all(60)
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        # The first who gets a five dies of it.
        pool.submit(5)
        ((_, (square, _)),) = pool.poll(timeout_s=60)
    assert square == 25 and pool.deaths == 4


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("1 worker(s) were killed due to the node running low on memory"),
        ObjectLostError("f00d", None, ""),
    ],
    ids=["its host had no memory left", "its host died with the answer"],
)
def test_a_member_whose_end_ray_tells_of_in_other_words_is_replaced(tmp_path, monkeypatch, error):
    get, ended = ray.get, []

    def end_first(reference: object) -> object:
        if not ended:
            ended.append(reference)
            raise error
        return get(reference)

    with Pool(_build_squarer, str(tmp_path), members=1, cluster=TWO) as pool:
        pool.wait_for_all(60)
        monkeypatch.setattr("cluster.pool.ray.get", end_first)
        pool.submit(3)
        ((_, (square, _)),) = pool.poll(timeout_s=60)
    assert square == 9 and pool.deaths == 1


def test_tasks_give_all_results_and_pass_errors_on():
    assert sorted(run_tasks(_double, range(8), description="doubling", config=TWO)) == list(range(0, 16, 2))
    with pytest.raises(DataError, match="13 is not allowed; leave it out"):
        list(run_tasks(_double, [1, 13], description="doubling", config=TWO))
    with pytest.raises(StorageError, match="/shards/chunk must have room to write"):
        list(run_tasks(_fill_disk, ["/shards/chunk"], description="writing", config=TWO))


def test_a_task_whose_worker_dies_each_time_is_told_of_by_what_was_being_done():
    with pytest.raises(ClusterError, match=r"writing needs workers that live .* look at the memory"):
        list(run_tasks(_die, [1], description="writing", config=TWO))


def test_work_is_submitted_and_collected_without_waiting(tmp_path):
    with Pool(_build_mortal, str(tmp_path / "none"), members=2, cluster=TWO) as pool:
        tickets = [pool.submit(item) for item in "abcd"]
        assert tickets == [0, 1, 2, 3] and pool.pending == 4
        assert pool.poll(timeout_s=0) == []
        collected = []
        while pool.pending:
            collected += pool.poll()
        assert sorted(collected) == list(enumerate("abcd")) and pool.poll() == []


def test_a_pool_without_any_member_waits_for_one_and_then_gives_up(tmp_path, caplog):
    marker = tmp_path / "marker"
    with Pool(_build_mortal, str(marker), members=2, cluster=TWO, patience_s=30, name="reward pool") as pool:
        list(pool.map("ab"))
        marker.touch()
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        threading.Timer(2, marker.unlink).start()
        with caplog.at_level(logging.WARNING):
            assert sorted(pool.map("cd")) == [(0, "c"), (1, "d")]
        assert "all 2 members of the reward pool are gone; waiting up to 30 s" in caplog.text
        assert "has a member again" in caplog.text
        pool._limit_s = 2
        marker.touch()
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(PoolGoneError, match="has had none for 2 s; nothing is lost"):
            list(pool.map("ef"))
        assert time.monotonic() - started < 10


def test_what_a_member_fails_to_build_is_raised_and_not_tried_again():
    with Pool(_build_nothing, members=1, cluster=TWO) as pool, pytest.raises(DataError, match="make some"):
        list(pool.map([1]))
