"""What a step's completions are worth, where none is there."""

import torch

from cluster.process import Process
from rl.advantages.group import GroupRelative
from rl.scoring import Scorer
from rl.stopwatch import Stopwatch
from tests.rl.groups import nobody

PROCESS = Process(
    rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), host_group=None, num_threads=1
)


def test_a_step_without_users_has_no_advantages_and_no_numbers_and_asks_no_reward():
    scorer = Scorer(None, GroupRelative.Config().build(), PROCESS, Stopwatch())
    found = scorer.score([nobody(group_size=4)])
    assert found.advantages.values.shape == found.advantages.mask.shape == (0, 4)
    assert found.advantages.skipped.shape == (0,) and not found.numbers
