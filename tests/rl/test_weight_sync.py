"""Weights reach those who draw, whole, from learners that each keep a part; versions are never used twice."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cluster.process import Process
from cluster.storage import Storage
from rl import weight_sync
from rl.policy_version import age, new_start, version_of
from rl.weight_sync import gather_weights, put_weights
from sharding.state import Piece
from tests.generator_cases import make_generator
from tests.process_group import ALONE, run_on_processes
from tests.training_cases import Case, make_learner, run_steps
from trainer.plain_engine import named_state, named_trainable


def trained(process: Process, case: Case):
    # Buckets that end inside of pieces.
    weight_sync.BUCKET_VALUES = 1000
    learner = make_learner(case, process)
    run_steps(case, process, learner, 0, case.steps)
    return gather_weights(learner.engine, process)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_all_weights_of_two_learners_reach_a_model_elsewhere(zero_stage):
    case = Case(model="decoder-only", zero_stage=zero_stage, steps=2)
    expected = make_learner(case, None)
    run_steps(case, None, expected, 0, case.steps)
    gathered, nothing = run_on_processes(trained, 2, case)
    assert nothing is None
    model = make_generator("decoder-only", seed=9)
    put_weights(model, gathered.arrays())
    wanted = dict([*named_trainable(expected.module), *named_state(expected.module)])
    assert list(wanted) == [name for name, _ in gathered.layout]
    for name, tensor in named_trainable(model):
        torch.testing.assert_close(tensor, wanted[name], atol=2e-5, rtol=1e-3, msg=name)


def gathered_from_rank_0_alone(process: Process):
    """A model so small that no part of it lies on the second rank."""
    values = {"table": torch.arange(6.0), "bias": torch.tensor([-1.0])}
    pieces = [Piece(name=f"dense/{n}", start=0, global_shape=v.shape, tensor=v) for n, v in values.items()]
    engine = SimpleNamespace(
        dense_shapes=lambda: {"table": [2, 3], "bias": [1]},
        weights=lambda: pieces if process.rank == 0 else [],
    )
    return gather_weights(engine, process)


def test_a_learner_that_keeps_no_piece_takes_part():
    gathered, nothing = run_on_processes(gathered_from_rank_0_alone, 2)
    assert nothing is None
    arrays = gathered.arrays()
    assert arrays["table"].tolist() == [0, 1, 2, 3, 4, 5] and arrays["bias"].tolist() == [-1]


def test_weights_read_in_place_are_copied():
    model = make_generator("decoder-only")
    weights = {name: tensor.detach().numpy().reshape(-1) + 1 for name, tensor in named_trainable(model)}
    for array in weights.values():
        array.flags.writeable = False
    put_weights(model, weights)
    name, tensor = named_trainable(model)[0]
    assert np.array_equal(tensor.detach().numpy().reshape(-1), weights[name])
    tensor.data.zero_()
    assert weights[name].any()


def test_versions_of_a_lost_start_are_never_given_again(tmp_path):
    first, second = (new_start(Storage(tmp_path), ALONE) for _ in range(2))
    assert second == first + 1
    lost, now = version_of(first, 47), version_of(second, 41)
    assert now > lost
    assert age(lost, now) is None
    assert age(version_of(second, 40), now) == 1
