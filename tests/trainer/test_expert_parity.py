"""Experts on one process, on every rank, and spread over ranks train alike: losses, weights, moments and biases."""

from dataclasses import replace

import pytest

from tests.trainer.test_parity import assert_same_training
from tests.training_cases import Case

CASE = Case(model="mixture", steps=13)


@pytest.mark.parametrize(
    ("world_size", "size", "zero_stage"), [(1, 1, 1), (2, 1, 3), (2, 2, 1), (2, 2, 2), (4, 2, 1)]
)
def test_experts_on_ranks_equal_the_unsharded_reference(world_size, size, zero_stage):
    case = replace(CASE, expert_parallel=size, zero_stage=zero_stage)
    assert_same_training(case, world_size, against=CASE)
