"""Advantages against numbers worked out by hand."""

import numpy as np
import pytest

from cluster.errors import ConfigError
from rl.advantages.binary import Binary
from rl.advantages.group import GroupRelative
from rl.advantages.leave_one_out import LeaveOneOut
from rl.advantages.step_wise import StepWise


def estimate(config, values, mask=None):
    values = np.array(values, dtype=np.float32)
    mask = np.ones(values.shape[:2], dtype=bool) if mask is None else np.array(mask)
    return config.build()(values, mask)


def test_group_advantages_by_hand():
    # Mean 2, spread sqrt(2): (0, 2, 4, 2) -> -1.414, 0, 1.414, 0. The second group is flat and skipped.
    found = estimate(GroupRelative.Config(), [[0, 2, 4, 2], [3, 3, 3, 3]])
    np.testing.assert_allclose(found.values[0], [-np.sqrt(2), 0, np.sqrt(2), 0], rtol=1e-5)
    assert found.skipped.tolist() == [False, True]
    assert not found.values[1].any() and found.mask.all()


def test_group_advantages_know_only_what_has_a_reward():
    found = estimate(GroupRelative.Config(), [[0, 2, 100]], [[True, True, False]])
    np.testing.assert_allclose(found.values, [[-1, 1, 0]], rtol=1e-5)
    assert found.mask.tolist() == [[True, True, False]]


def test_group_advantages_are_cut_and_may_keep_their_size():
    lonely = [[1.0] + [0.0] * 99]
    assert estimate(GroupRelative.Config(), lonely).values.max() == 5
    found = estimate(GroupRelative.Config(divide_by_std=False), [[0, 2, 4, 2]])
    assert found.values.tolist() == [[-2, 0, 2, 0]]


def test_leave_one_out_by_hand():
    found = estimate(LeaveOneOut.Config(), [[1, 2, 6], [1, 2, 50]], [[True] * 3, [True, True, False]])
    np.testing.assert_allclose(found.values, [[1 - 4, 2 - 3.5, 6 - 1.5], [-1, 1, 0]])


def test_binary_advantages_by_hand():
    # Values at or above 0: .1 .2 .3 .4 .5 .6 .7 .8; the quantile .75 is .625: two of eight pass.
    values = [[0.1, 0.2, 0.3, 0.4, -1.0], [0.5, 0.6, 0.7, 0.8, 0.9]]
    found = estimate(Binary.Config(), values, [[True] * 5, [True] * 4 + [False]])
    assert found.values.tolist() == [[0, 0, 0, 0, -1], [0, 0, 1, 1, 0]]
    legal = estimate(Binary.Config(threshold=0.5), [[1, 1, 0, 0]], [[True, True, False, True]])
    assert legal.values.tolist() == [[1, 1, 0, 0]] and legal.skipped.tolist() == [False]
    assert estimate(Binary.Config(threshold=0.5), [[0, 0]]).skipped.tolist() == [True]


def test_binary_advantages_let_all_of_the_best_pass_where_they_are_more_than_the_top_share():
    assert estimate(Binary.Config(), [[1, 1, 0, 0]]).values.tolist() == [[1, 1, 0, 0]]
    assert estimate(Binary.Config(), [[0.25, 0.5, 0.5, -1]]).values.tolist() == [[0, 1, 1, -1]]
    assert estimate(Binary.Config(), [[0.5, 0.5, 0.5, 0.5]]).skipped.tolist() == [True], "none is better"


def test_step_wise_advantages_by_hand():
    # Depth 1: -1, 1. Depth 2: equal, nothing. Depth 3: 1, -1. Each code gets its own and the later ones.
    found = estimate(StepWise.Config(), [[[0, 5, 3], [2, 5, 1]]])
    np.testing.assert_allclose(found.values, [[[0, 1, 1], [0, -1, -1]]], atol=1e-5)
    discounted = estimate(StepWise.Config(discount=0.5), [[[0, 5, 3], [2, 5, 1]]])
    np.testing.assert_allclose(discounted.values[0, 0], [-1 + 0.25, 0.5, 1], atol=1e-5)
    assert estimate(StepWise.Config(), [[[1, 2], [1, 2]]]).skipped.tolist() == [True]


def test_rewards_of_the_wrong_kind_are_refused():
    with pytest.raises(ConfigError, match="GroupRelative takes rewards that are one per completion"):
        estimate(GroupRelative.Config(), [[[1, 2]]])
    with pytest.raises(ConfigError, match="StepWise takes rewards that are one per code"):
        estimate(StepWise.Config(), [[1, 2]])


@pytest.mark.parametrize(
    "build",
    [
        lambda: GroupRelative.Config(limit=0),
        lambda: Binary.Config(top_share=1.0),
        lambda: Binary.Config(threshold=-0.5),
        lambda: StepWise.Config(discount=2),
    ],
)
def test_impossible_options_are_refused(build):
    with pytest.raises(ConfigError, match="advantage"):
        build()
