"""The reward pool on real processes: overlap, a killed worker, and rewards that are none."""

import asyncio
import os
import random
import signal
import time

import numpy as np
import pytest

from cluster.configuration import ClusterConfig
from cluster.errors import ConfigError, DataError, PoolGoneError, RewardError
from rl.reward_mix import RewardTerm
from rl.reward_pool import OwnRewards, RewardPool, RewardPoolConfig, build_scorer
from rl.rewards import RewardSetting
from rl.rewards.hit import Hit
from rl.rewards.python_function import PythonFunction
from tests.rl.groups import group

CLUSTER = ClusterConfig(start_timeout_s=60)
SETTING = RewardSetting(data_path="")
WAIT_S = 0.25


async def slow(groups):
    await asyncio.sleep(WAIT_S * len(groups))
    return [group.items * 2.0 for group in groups]


def fails_for_user_99(groups):
    if any(group.user_row == 99 for group in groups):
        raise KeyError("no such user")
    return [np.ones(group.size) for group in groups]


def fails_for_several(groups):
    if len(groups) > 1:
        raise MemoryError("too many")
    return [np.ones(group.size) for group in groups]


def lacks_a_column(groups):
    raise DataError("the column price is missing; name it in --data.columns")


def not_finite(groups):
    return [np.where(group.user_row == 2, np.inf, 1.0) * np.ones(group.size) for group in groups]


def too_short(groups):
    return [np.ones(1) for _ in groups]


def function(name, **options):
    return RewardTerm(
        name=name, reward=PythonFunction.Config(path=f"tests.rl.test_reward_pool:{name}"), **options
    )


def groups_of(count):
    return [group([user, -1], positives=[user], user=user, serial=user) for user in range(count)]


def wait_for_workers(pool, count):
    until = time.monotonic() + 60
    while len(pool.pids) < count and time.monotonic() < until:
        pool.collect(pool.submit(groups_of(1)))
    assert len(pool.pids) == count


@pytest.fixture(scope="module")
def pool():
    terms = [RewardTerm(name="hit", reward=Hit.Config()), function("slow"), function("fails_for_user_99")]
    config = RewardPoolConfig(workers=2, cpus_per_worker=0.5, groups_per_call=2, wait_s=0.5)
    with RewardPool(terms, SETTING, config=config, cluster=CLUSTER) as pool:
        wait_for_workers(pool, 2)
        yield pool


def expected(count):
    return [[1 + user * 2 + 1, 0 - 2 + 1] for user in range(count)]


def test_batches_overlap_and_come_back_in_order(pool):
    started = time.monotonic()
    first, second = pool.submit(groups_of(8)), pool.submit(groups_of(4))
    assert pool.collect(second).values.tolist() == expected(4)
    found = pool.collect(first)
    took_s = time.monotonic() - started
    assert found.values.tolist() == expected(8)
    assert found.report["hit/mean"] == 0.5 and found.report["slow/seconds"] >= 8 * WAIT_S
    assert took_s < 0.9 * 12 * WAIT_S


@pytest.mark.parametrize("seed", [5])
def test_the_groups_of_a_killed_worker_are_scored_elsewhere_within_seconds(pool, seed, caplog):
    started = time.monotonic()
    ticket = pool.submit(groups_of(12))
    time.sleep(WAIT_S)
    os.kill(random.Random(seed).choice(pool.pids), signal.SIGKILL)
    assert pool.collect(ticket).values.tolist() == expected(12)
    assert caplog.text.count("of the reward pool died with item") == 1
    # The worker that is left could do all of it, the two parts that were lost included.
    assert time.monotonic() - started < (12 + 4) * WAIT_S + 4


def test_an_error_of_a_reward_comes_out_of_the_pool_and_does_not_harm_it(pool):
    ticket = pool.submit([*groups_of(1), group([1, 2], user=99, serial=4)])
    with pytest.raises(RewardError, match=r"fails_for_user_99 failed for user row 99 \(prompt 4\): KeyError"):
        pool.collect(ticket)
    assert pool.collect(pool.submit(groups_of(1))).values.tolist() == expected(1)


def test_without_any_worker_the_run_waits_and_then_stops_to_be_resumed(pool):
    wait_for_workers(pool, 2)
    for pid in pool.pids:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(PoolGoneError, match="reward pool needs at least one of its 2 members"):
        pool.collect(pool.submit(groups_of(6)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fails_for_several",
            "for the user rows 0, 1, 2, 3 together, and for none of them alone: MemoryError",
        ),
        ("lacks_a_column", "user row 0 .*DataError: the column price is missing; name it in --data.columns$"),
        ("not_finite", "not_finite must be finite, and is inf for user row 2"),
        ("too_short", r"too_short must return values \(2,\) .* for user row 0"),
    ],
)
def test_what_is_no_reward_names_the_reward_and_the_user(name, message):
    score = build_scorer([function(name)], SETTING)
    with pytest.raises(RewardError, match=message):
        score(groups_of(4))


def test_a_process_that_scores_by_itself_gives_the_same_rewards():
    terms = [RewardTerm(name="hit", reward=Hit.Config()), function("fails_for_user_99")]
    with OwnRewards(terms, SETTING) as rewards:
        first, second = rewards.submit(groups_of(3)), rewards.submit(groups_of(2))
        assert rewards.collect(second).values.tolist() == [[2, 1]] * 2
        assert rewards.collect(first).values.tolist() == [[2, 1]] * 3
        with pytest.raises(RewardError, match="user row 99"):
            rewards.collect(rewards.submit([group([1, 2], user=99)]))


def test_impossible_sizes_are_refused():
    with pytest.raises(ConfigError, match=r"reward\.workers"):
        RewardPoolConfig(workers=-1)
