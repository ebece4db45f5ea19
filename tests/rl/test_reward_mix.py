"""Several rewards together: weights, masks, direct terms, reports, and what is no reward."""

import numpy as np
import pytest

from cluster.errors import ConfigError, RewardError
from rl.advantages.group import GroupRelative
from rl.advantages.step_wise import StepWise
from rl.reward_mix import RewardTerm, check_rewards, check_terms, mix, prepare_terms
from rl.rewards import RewardSetting
from rl.rewards.hit import Hit
from rl.types import Completions, Prompts, Reward
from tests.rl.groups import group

HIT = Hit.Config()


def term(name, **options):
    return RewardTerm(name=name, reward=HIT, **options)


def test_rewards_add_up_by_weight_and_each_is_reported():
    first = [Reward.of([0, 2]), Reward.of([1, 1])]
    second = [Reward.of([1, 0], np.array([True, False])), Reward.of([3, 5])]
    found = mix([term("a"), term("b", weight=-0.5)], {"a": first, "b": second})
    assert found.values.tolist() == [[-0.5, 2], [-0.5, -1.5]] and found.mask.all()
    report = found.report
    assert report["a/mean"] == 1 and report["b/mean"] == 3
    assert report["a/spread"] == 0.5 and report["b/spread"] == 0.5
    assert report["a/share"] == pytest.approx(2 / 3) and report["b/share"] == pytest.approx(1 / 3)


def test_what_no_reward_has_an_opinion_of_does_not_count():
    mask = np.array([True, True, False])
    found = mix([term("a")], {"a": [Reward.of([0, 2, 9], mask)]})
    assert found.mask.tolist() == [mask.tolist()]
    advantages = found.advantages(GroupRelative.Config().build())
    np.testing.assert_allclose(advantages.values, [[-1, 1, 0]], rtol=1e-5)


def test_a_direct_term_is_added_to_the_advantages():
    rewards = {"a": [Reward.of([1, 1, 1])], "legal": [Reward.of([1, 1, 0], np.array([True, False, False]))]}
    found = mix([term("a"), term("legal", weight=0.5, direct=True)], rewards)
    advantages = found.advantages(GroupRelative.Config().build())
    assert advantages.values.tolist() == [[0.5, 0, 0]]
    assert advantages.mask.all() and advantages.skipped.tolist() == [False]


def test_a_direct_term_of_codes_is_added_code_by_code_and_leaves_the_others_as_they_are():
    rewards = {"a": [Reward.of([1, 3])], "prm": [Reward.of([[1, 2], [4, -1]])], "b": [Reward.of([1, 0])]}
    found = mix([term("a"), term("prm", weight=0.5, direct=True), term("b", direct=True)], rewards)
    assert found.values.tolist() == [[1, 3]] and found.direct.tolist() == [[[1.5, 2], [2, -0.5]]]
    advantages = found.advantages(GroupRelative.Config().build())
    np.testing.assert_allclose(advantages.values, [[[0.5, 1], [3, 0.5]]], atol=1e-5)


def test_a_direct_term_of_items_is_added_to_all_codes():
    rewards = {"prm": [Reward.of([[0, 1], [2, 3]])], "legal": [Reward.of([1, 0])]}
    found = mix([term("prm"), term("legal", direct=True)], rewards)
    advantages = found.advantages(StepWise.Config(discount=0.0).build())
    np.testing.assert_allclose(advantages.values, [[[0, 0], [1, 1]]], atol=1e-5)


def test_a_reward_of_items_stands_at_the_last_code_beside_one_of_codes():
    rewards = {"prm": [Reward.of([[0, 1], [2, 1]])], "a": [Reward.of([4, 0])]}
    found = mix([term("prm"), term("a")], rewards)
    assert found.values.tolist() == [[[0, 5], [2, 1]]]
    advantages = found.advantages(StepWise.Config().build())
    np.testing.assert_allclose(advantages.values, [[[0, 1], [0, -1]]], atol=1e-5)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "one reward for each of 1 groups"),
        ([Reward.of([1, 2, 3])], r"values \(2,\) .* for user row 7 \(prompt 5\), and returned \(3,\)"),
        ([Reward.of([1, np.nan])], "must be finite, and is nan for user row 7 .* completion 1 .item row 4"),
        ([Reward(values=np.ones(2), mask=np.ones(2))], "bool mask"),
    ],
)
def test_what_is_no_reward_is_named_with_its_user(rewards, message):
    with pytest.raises(RewardError, match=message):
        check_rewards("mine", HIT.build(RewardSetting(data_path="")), [group([3, 4], serial=5)], rewards)


def test_a_value_that_is_masked_may_be_anything():
    reward = Reward.of([1, np.nan], np.array([True, False]))
    check_rewards("mine", HIT.build(RewardSetting(data_path="")), [group([3, 4])], [reward])
    assert mix([term("a")], {"a": [reward]}).values.tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "at least one reward"),
        ([term("a"), term("a")], "a name of its own"),
        ([term("a", weight=0.0)], "other than 0"),
        ([term("a", direct=True)], "must not be direct"),
    ],
)
def test_impossible_mixes_are_refused(terms, message):
    with pytest.raises(ConfigError, match=message):
        check_terms(terms)


def test_terms_are_configured_by_the_rewards_of_the_project():
    with pytest.raises(ConfigError, match="one of rl/rewards"):
        prepare_terms([RewardTerm(name="a", reward=None)], RewardSetting(data_path=""))
    assert prepare_terms([term("a")], RewardSetting(data_path=""))[0].reward == HIT


def test_completions_fall_into_groups_of_their_users():
    prompts = Prompts(
        serials=np.array([10, 11]),
        user_rows=np.array([5, 6]),
        history=np.array([1, 2, 3]),
        history_offsets=np.array([0, 2, 3]),
        positives=np.array([8]),
        positive_offsets=np.array([0, 0, 1]),
        positive_paths=np.array([[3, 3]]),
        history_features={"action": np.array([0, 1, 0])},
    )
    completions = Completions(
        prompts=prompts,
        paths=np.array([[[3, 3], [0, 1], [2, 0]], [[3, 3], [3, 3], [3, 0]]]),
        items=np.array([[8, -1, 2], [8, 7, 4]]),
        log_probs=np.full((2, 3, 2), -1, dtype=np.float32),
        policy_version=4,
    )
    first, second = completions.groups()
    assert first.history.tolist() == [1, 2] and not len(first.positives) and first.serial == 10
    assert second.history_features["action"].tolist() == [0] and second.log_probs.tolist() == [-2] * 3
    assert second.is_positive.tolist() == [True, True, False]
    assert completions.legal.tolist() == [[True, False, True], [True, True, True]]
    with pytest.raises(ValueError, match="need paths and log_probs"):
        Completions(**{**vars(completions), "items": np.zeros((2, 2))})
