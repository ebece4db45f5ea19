"""Objectives of alignment against numbers worked out by hand and the bounds their papers claim."""

import math

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError
from cluster.plugins import plugin_config, plugin_files
from rl.advantages.group import GroupRelative
from rl.objectives import PolicyInputs
from rl.objectives.dpo import Dpo
from rl.objectives.dr_grpo import DrGrpo
from rl.objectives.ecpo import Ecpo
from rl.objectives.gbpo import Gbpo
from rl.objectives.grpo import Grpo
from rl.objectives.grpo_sr import GrpoSr
from rl.objectives.gspo import Gspo

OBJECTIVES = list(plugin_files("rl.objectives"))
OF_PAIRS = "dpo"
"""Moves the best and the worst completion of a group, and only these."""
WITHOUT_RATIO = ("dpo", "grpo-sr")


def inputs(new, old, advantages, *, mask=None, reference=None, positives=None, positive_mask=None):
    """Of nested lists of probabilities; returns the inputs and the log-probabilities that carry the gradient."""
    log = lambda values: None if values is None else torch.tensor(values, dtype=torch.float64).log()  # noqa: E731
    leaf = log(new).requires_grad_()
    advantages = torch.tensor(advantages, dtype=torch.float64)
    return (
        PolicyInputs(
            log_probs=leaf,
            old_log_probs=log(old),
            advantages=advantages,
            mask=torch.ones(leaf.shape[:2], dtype=torch.bool) if mask is None else torch.tensor(mask),
            reference_log_probs=log(reference),
            positive_log_probs=None if positives is None else log(positives).requires_grad_(),
            positive_mask=None if positive_mask is None else torch.tensor(positive_mask),
        ),
        leaf,
    )


def gradient(objective, given, leaf):
    objective(given).sum.backward()
    return leaf.grad


def random_inputs(seed, *, users=3, group=4, levels=3):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    leaf = draw(users, group, levels).clamp(0.02, 0.98).log().requires_grad_()
    return (
        PolicyInputs(
            log_probs=leaf,
            old_log_probs=(draw(users, group, levels) ** 3).clamp(1e-4, 0.98).log(),
            advantages=draw(users, group) * 4 - 2,
            mask=draw(users, group) < 0.8,
            reference_log_probs=draw(users, group, levels).clamp(0.02, 0.98).log(),
            positive_log_probs=draw(users, 2, levels).clamp(0.02, 0.98).log(),
            positive_mask=draw(users, 2) < 0.7,
        ),
        leaf,
    )


def test_grpo_by_hand():
    # Ratios 2 (clipped to 1.2, A = 1), .5 (A = 1, not clipped: min(.5, .8)) and .5 (A = -1: min(-.5, -.8)), 1.1.
    given, leaf = inputs([[[0.4, 0.2], [0.2, 0.22]]], [[[0.2, 0.4], [0.4, 0.2]]], [[1.0, -1.0]])
    loss = Grpo.Config(kl_weight=0).build()(given)
    assert loss.sum.item() == pytest.approx(-((1.2 + 0.5) / 2 + (-0.8 - 1.1) / 2) / 2) and loss.count == 1
    assert loss.metrics["clipped_share"].item() == pytest.approx(3 / 4)
    loss.sum.backward()
    expected = -torch.tensor([[[0.0, 0.5], [0.0, -1.1]]], dtype=torch.float64) / 4
    torch.testing.assert_close(leaf.grad, expected)


def test_the_kl_of_grpo_is_k3_and_vanishes_at_the_reference():
    given, leaf = inputs([[[0.5]]], [[[0.5]]], [[0.0]], reference=[[[0.25]]])
    loss = Grpo.Config(kl_weight=0.1).build()(given)
    k3 = 0.5 - math.log(0.5) - 1
    assert loss.sum.item() == pytest.approx(0.1 * k3) and loss.metrics["kl"].item() == pytest.approx(k3)
    loss.sum.backward()
    # d k3 / d ln pi = 1 - q.
    assert leaf.grad.item() == pytest.approx(0.1 * (1 - 0.5))
    at_reference, _ = inputs([[[0.5]]], [[[0.5]]], [[0.0]], reference=[[[0.5]]])
    assert Grpo.Config(kl_weight=0.1).build()(at_reference).sum.item() == 0


def test_a_group_without_a_difference_is_still_held_to_the_reference():
    flat = GroupRelative.Config().build()(np.array([[1.0, 1.0]]), np.array([[True, False]]))
    given, leaf = inputs(
        [[[0.5], [0.5]]],
        [[[0.5], [0.5]]],
        flat.values.tolist(),
        mask=flat.mask.tolist(),
        reference=[[[0.25], [0.25]]],
    )
    assert flat.skipped.all()
    slope = gradient(Grpo.Config(kl_weight=0.1).build(), given, leaf)
    # As in any other group, and nothing of what no reward has an opinion of.
    torch.testing.assert_close(slope, torch.tensor([[[0.1 * (1 - 0.5) / 2], [0.0]]], dtype=torch.float64))


def test_dr_grpo_divides_by_a_constant():
    given, _ = inputs([[[0.2, 0.2], [0.2, 0.2]]], [[[0.2, 0.2], [0.2, 0.2]]], [[3.0, -1.0]])
    assert DrGrpo.Config().build()(given).sum.item() == pytest.approx(-1.0)
    assert DrGrpo.Config(max_length=4).build()(given).sum.item() == pytest.approx(-0.5)


def test_grpo_sr_by_hand():
    given, leaf = inputs(
        [[[0.1, 0.5], [0.2, 0.4]]],
        [[[0.9, 0.9], [0.9, 0.9]]],
        [[2.0, -2.0]],
        positives=[[[0.5, 0.25], [0.1, 0.1]]],
        positive_mask=[[True, False]],
    )
    loss = GrpoSr.Config(alpha=0.5).build()(given)
    nll = -math.log(0.5 * 0.25)
    assert loss.sum.item() == pytest.approx(0.5 * nll)
    assert loss.metrics["policy"].item() == pytest.approx(0) and loss.metrics[
        "positive_nll"
    ].item() == pytest.approx(nll)
    loss.sum.backward()
    # The ratio is 1 whatever drew the completions: the gradient is -A / (G L).
    expected = -torch.tensor([[[2.0, 2.0], [-2.0, -2.0]]], dtype=torch.float64) / 4
    torch.testing.assert_close(leaf.grad, expected)
    expected = torch.tensor([[[-0.5, -0.5], [0, 0]]], dtype=torch.float64)
    torch.testing.assert_close(given.positive_log_probs.grad, expected)


def test_the_likelihood_is_a_mean_over_the_positives_a_user_has():
    given, _ = inputs(
        [[[0.1]]] * 2,
        [[[0.1]]] * 2,
        [[0.0]] * 2,
        positives=[[[0.5], [0.25]], [[0.5], [0.5]]],
        positive_mask=[[True, True], [False, False]],
    )
    expected = -(math.log(0.5) + math.log(0.25)) / 2
    assert GrpoSr.Config(alpha=1.0).build()(given).sum.item() == pytest.approx(expected)


def test_ecpo_caps_the_ratio_before_it_meets_a_negative_advantage():
    # Item ratios: .4/.01 = 40 at A = -1 (capped at 1.3), .02/.01 = 2 at A = 1 (clipped to 1.2, no gradient).
    given, leaf = inputs([[[0.8, 0.5], [0.2, 0.1]]], [[[0.1, 0.1], [0.1, 0.1]]], [[-1.0, 1.0]])
    loss = Ecpo.Config(alpha=0.0).build()(given)
    assert loss.sum.item() == pytest.approx((1.3 - 1.2) / 2)
    loss.sum.backward()
    expected = torch.tensor([[[1.3, 1.3], [0, 0]]], dtype=torch.float64) / 2
    torch.testing.assert_close(leaf.grad, expected)
    clipped = gradient(Grpo.Config(kl_weight=0).build(), *inputs([[[0.4]]], [[[0.01]]], [[-1.0]]))
    assert clipped.item() == pytest.approx(40)


@pytest.mark.parametrize("ratio_of", ["item", "code"])
@pytest.mark.parametrize("seed", range(5))
def test_no_gradient_of_ecpo_exceeds_its_cap(seed, ratio_of):
    given, leaf = random_inputs(seed)
    slope = gradient(Ecpo.Config(alpha=0.0, ratio_of=ratio_of).build(), given, leaf)
    terms = leaf.shape[1] * (1 if ratio_of == "item" else leaf.shape[2])
    assert (slope.abs() <= 1.3 * given.advantages.abs()[..., None] / terms + 1e-12).all()


def test_gbpo_by_hand():
    # A = 1: .4/max(.1, .4) = 1 and .2/max(.5, .2) = .4. A = -1: .4/max(.1, .6) = 2/3 and .9/max(.5, .1) = 1.8.
    given, leaf = inputs([[[0.4, 0.2], [0.4, 0.9]]], [[[0.1, 0.5], [0.1, 0.5]]], [[1.0, -1.0]])
    loss = Gbpo.Config(alpha=0.0).build()(given)
    assert loss.sum.item() == pytest.approx((-(1 + 0.4) / 2 + (2 / 3 + 1.8) / 2) / 2)
    loss.sum.backward()
    expected = torch.tensor([[[-1, -0.4], [2 / 3, 1.8]]], dtype=torch.float64) / 4
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("ratio_of", ["item", "code"])
@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_of_gbpo_is_bounded_by_that_of_binary_cross_entropy(seed, ratio_of):
    given, leaf = random_inputs(seed)
    slope = gradient(Gbpo.Config(alpha=0.0, ratio_of=ratio_of).build(), given, leaf)
    log_pi = leaf.detach()
    terms = leaf.shape[1] * leaf.shape[2]
    if ratio_of == "item":
        log_pi, terms = log_pi.sum(-1, keepdim=True).expand_as(leaf), leaf.shape[1]
    pi = log_pi.exp()
    # BCE on ln pi: 1 where the event is wanted, pi / (1 - pi) where it is not.
    advantages = given.advantages[..., None]
    bound = torch.where(advantages >= 0, 1.0, pi / (1 - pi)) * advantages.abs() / terms
    assert (slope.abs() <= bound + 1e-9).all()


def test_gspo_clips_the_geometric_mean_of_the_ratios_of_a_path():
    # sqrt(2 * 1/2) = 1 although both codes moved; sqrt(1.1 * 1.1) = 1.1 is clipped to 1.0004, and .81 to .9997.
    given, leaf = inputs(
        [[[0.4, 0.2], [0.22, 0.22], [0.162, 0.162]]],
        [[[0.2, 0.4], [0.2, 0.2], [0.2, 0.2]]],
        [[1.0, 2.0, -3.0]],
    )
    loss = Gspo.Config().build()(given)
    assert loss.sum.item() == pytest.approx(-(1.0 + 2 * 1.0004 - 3 * 0.9997) / 3) and loss.count == 1
    assert loss.metrics["clipped_share"].item() == pytest.approx(2 / 3)
    assert loss.metrics["ratio"].item() == pytest.approx((1 + 1.1 + 0.81) / 3)
    loss.sum.backward()
    expected = torch.tensor([[[-0.5, -0.5], [0, 0], [0, 0]]], dtype=torch.float64) / 3
    torch.testing.assert_close(leaf.grad, expected)


def dpo_inputs(**options):
    """Gains ln(.2/.1) = ln 2, ln(.1/.2) = -ln 2, ln(.4/.1) = ln 4 of the reference; the last does not count."""
    return inputs(
        [[[0.2], [0.1], [0.4], [0.9]]],
        [[[0.5]] * 4],
        [[0.3, 2.0, -1.0, 9.0]],
        mask=[[True, True, True, False]],
        reference=[[[0.1], [0.2], [0.1], [0.1]]],
        **options,
    )


def test_dpo_by_hand():
    # The second has the largest advantage, the third the smallest: beta (ln .5 - ln 4) = -.5 ln 8.
    given, leaf = dpo_inputs()
    loss = Dpo.Config(beta=0.5, alpha=0.0).build()(given)
    margin = -0.5 * math.log(8)
    assert loss.sum.item() == pytest.approx(math.log1p(math.exp(-margin))) and loss.count == 1
    assert loss.metrics["margin"].item() == pytest.approx(margin)
    assert loss.metrics["gain_of_best"].item() == pytest.approx(-math.log(2))
    loss.sum.backward()
    slope = 0.5 / (1 + math.exp(margin))
    torch.testing.assert_close(leaf.grad, torch.tensor([[[0], [-slope], [slope], [0]]], dtype=torch.float64))


def test_softmax_dpo_compares_the_best_with_all_that_are_worse():
    given, leaf = dpo_inputs(positives=[[[0.5]]], positive_mask=[[True]])
    loss = Dpo.Config(beta=1.0, rejected="all", alpha=2.0).build()(given)
    # exp(D_l - D_w) is 2 / .5 = 4 and 4 / .5 = 8.
    assert loss.sum.item() == pytest.approx(math.log1p(4 + 8) + 2 * math.log(2))
    loss.sum.backward()
    expected = torch.tensor([[[4], [-12], [8], [0]]], dtype=torch.float64) / 13
    torch.testing.assert_close(leaf.grad, expected)


def test_dpo_has_no_pair_in_a_group_without_a_difference():
    given, leaf = inputs(
        [[[0.5], [0.5]]] * 2,
        [[[0.5], [0.5]]] * 2,
        [[1.0, 1.0], [1.0, 0.0]],
        reference=[[[0.5], [0.5]]] * 2,
    )
    loss = Dpo.Config(alpha=0.0).build()(given)
    assert loss.metrics["paired_share"].item() == 1 and loss.count == 2
    assert loss.sum.item() == pytest.approx(math.log(2))
    loss.sum.backward()
    assert (leaf.grad[0] == 0).all() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_completions_leave_no_trace_even_if_they_are_impossible(name):
    objective = plugin_config("rl.objectives", name)().build()
    given, leaf = random_inputs(1)
    log_probs = leaf.detach().masked_fill(~given.mask[..., None], float("-inf")).requires_grad_()
    impossible = PolicyInputs(**{**vars(given), "log_probs": log_probs})
    slopes = gradient(objective, given, leaf), gradient(objective, impossible, log_probs)
    torch.testing.assert_close(*slopes)
    assert (slopes[0][~given.mask] == 0).all() and slopes[0].isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_policy_all_objectives_push_in_the_direction_of_the_advantage(name):
    objective = plugin_config("rl.objectives", name)().build()
    given, leaf = random_inputs(2)
    on_policy = PolicyInputs(
        **{**vars(given), "old_log_probs": leaf.detach(), "reference_log_probs": leaf.detach()}
    )
    slope = gradient(objective, on_policy, leaf)
    wanted = -given.advantages[..., None].sign() * given.mask[..., None]
    if name == OF_PAIRS:
        counting = given.advantages.masked_fill(~given.mask, 0.0)
        extreme = [counting == counting.amax(1, keepdim=True), counting == counting.amin(1, keepdim=True)]
        wanted = wanted * (extreme[0] | extreme[1])[..., None]
    assert (slope.sign() == wanted).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_advantages_of_codes_equal_those_of_items_where_all_codes_have_the_same(name):
    objective = plugin_config("rl.objectives", name)().build()
    given, _ = random_inputs(3)
    of_codes = given.advantages[..., None].expand_as(given.log_probs)
    by_code = PolicyInputs(**{**vars(given), "advantages": of_codes})
    torch.testing.assert_close(objective(given).sum, objective(by_code).sum)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in WITHOUT_RATIO])
def test_on_policy_the_reported_ratio_is_1_whatever_completions_are_left_out(name):
    objective = plugin_config("rl.objectives", name)().build()
    given, leaf = random_inputs(4)
    advantages = given.advantages.abs() * given.mask
    on_policy = {"old_log_probs": leaf.detach(), "advantages": advantages}
    ratio = objective(PolicyInputs(**{**vars(given), **on_policy})).metrics["ratio"]
    assert not given.mask.all() and ratio.item() == pytest.approx(given.num_users)


def test_which_objectives_allow_stale_completions():
    strict = [
        name for name in OBJECTIVES if not plugin_config("rl.objectives", name)().build().learns_from_older
    ]
    assert strict == ["grpo-sr"]


@pytest.mark.parametrize(
    "build",
    [
        lambda: Grpo.Config(clip_low=1.5),
        lambda: DrGrpo.Config(max_length=0),
        lambda: GrpoSr.Config(alpha=-1),
        lambda: Ecpo.Config(early_clip=-1),
        lambda: Gbpo.Config(alpha=-1),
        lambda: Gspo.Config(clip_high=0.0),
        lambda: Dpo.Config(beta=0.0),
    ],
)
def test_impossible_options_are_refused(build):
    with pytest.raises(ConfigError, match="objective"):
        build()
