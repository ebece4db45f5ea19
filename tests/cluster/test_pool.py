import os
import signal
from pathlib import Path

import pytest

from cluster.configuration import ClusterConfig
from cluster.errors import ClusterError, DataError
from cluster.pool import Pool
from cluster.tasks import run_tasks

TWO = ClusterConfig(workers=2, start_timeout_s=60)


def _build_squarer(marker: str):
    def square(item: int) -> tuple[int, int]:
        if item == 5 and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item, os.getpid()

    return square


def _build_deadly():
    return lambda item: os.kill(os.getpid(), signal.SIGKILL)


def _double(number: int) -> int:
    if number == 13:
        raise DataError("13 is not allowed; leave it out")
    return 2 * number


def test_a_pool_finishes_every_item_though_a_member_is_killed(tmp_path, caplog):
    with Pool(_build_squarer, str(tmp_path / "marker"), members=2, cluster=TWO) as pool:
        answers = dict(pool.map(range(10)))
    assert {index: square for index, (square, _) in answers.items()} == {n: n * n for n in range(10)}
    assert "died with item 5" in caplog.text and pool.deaths == 1
    assert len({pid for _, pid in answers.values()}) <= 3


def test_an_item_that_kills_every_member_ends_the_pool_with_its_number():
    with (
        pytest.raises(ClusterError, match=r"3 have died, 3 of them with item 0"),
        Pool(_build_deadly, members=1, cluster=TWO) as pool,
    ):
        list(pool.map(["poison"]))


def test_tasks_give_all_results_and_pass_errors_on():
    assert sorted(run_tasks(_double, range(8), description="doubling", config=TWO)) == list(range(0, 16, 2))
    with pytest.raises(DataError, match="13 is not allowed; leave it out"):
        list(run_tasks(_double, [1, 13], description="doubling", config=TWO))
