"""What each rank gets of a step: nothing where there are no users, and its share however long that takes."""

import time

import numpy as np
import pytest

from cluster.configuration import ClusterConfig
from cluster.errors import PoolGoneError
from rl.advantages.group import GroupRelative
from rl.heartbeat import Heartbeat
from rl.reward_mix import RewardTerm, mix
from rl.reward_pool import Rewards
from rl.rewards.hit import Hit
from rl.scoring import Scorer
from rl.stopwatch import Stopwatch
from rl.types import Reward
from tests.process_group import ALONE, impatient, run_on_processes
from tests.rl.groups import completions

TIMEOUT_S, LATE_S = 2.0, 5.0


class LateRewards(Rewards):
    """Comes after the others would have given up, or is gone by then."""

    def __init__(self, *, is_gone: bool):
        self.is_gone = is_gone

    def submit(self, groups):
        self.due, self.groups = time.monotonic() + LATE_S, groups
        return 0

    def wait(self, ticket, timeout_s):
        time.sleep(timeout_s)
        if time.monotonic() < self.due:
            return False
        if self.is_gone:
            raise PoolGoneError("all members are gone")
        return True

    def collect(self, ticket):
        while not self.wait(ticket, 0.1):
            pass
        rewards = [Reward.of(np.arange(group.size)) for group in self.groups]
        return mix([RewardTerm(name="late", reward=Hit.Config())], {"late": rewards})

    def close(self):
        pass


def make_scorer(process, rewards):
    heartbeat = Heartbeat(process, ClusterConfig(collective_timeout_s=TIMEOUT_S))
    return Scorer(rewards, GroupRelative.Config().build(), process, Stopwatch(), heartbeat)


def score_late(process, is_gone):
    process = impatient(process, TIMEOUT_S)
    scorer = make_scorer(process, LateRewards(is_gone=is_gone) if process.rank == 0 else None)
    found = scorer.score([completions([[1, 2]]), completions([[3, 4]])] if process.rank == 0 else None)
    return None if found is None else found.completions.items.tolist()


@pytest.mark.parametrize(("is_gone", "shares"), [(False, [[[1, 2]], [[3, 4]]]), (True, [None, None])])
def test_no_rank_gives_up_while_the_first_one_waits_for_rewards(is_gone, shares):
    assert run_on_processes(score_late, 2, is_gone) == shares


def test_a_step_without_users_has_no_advantages_and_no_numbers_and_asks_no_reward():
    found = make_scorer(ALONE, None).score([completions(np.zeros((0, 4)))])
    assert found.advantages.values.shape == found.advantages.mask.shape == (0, 4)
    assert found.advantages.skipped.shape == (0,) and not found.numbers
