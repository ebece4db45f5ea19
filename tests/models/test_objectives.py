"""Objectives against naive loops over the formula, values and gradients."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from cluster.errors import ConfigError
from cluster.plugins import plugin_config
from launch.commands.pretrain import OBJECTIVES, objective_names
from models.objectives.bce import BinaryCrossEntropy
from models.objectives.bpr import BayesianPersonalisedRanking
from models.objectives.bpr_max import BprMax
from models.objectives.full_softmax import FullSoftmax
from models.objectives.gbce import GeneralisedBinaryCrossEntropy
from models.objectives.in_batch_softmax import InBatchSoftmax
from models.objectives.sampled_softmax import SampledSoftmax
from models.objectives.top1 import Top1
from models.objectives.top1_max import Top1Max
from models.recommender import StepContext

CONTEXT = StepContext(step=0)
NUM_ITEMS = 20
COUNTS = np.arange(1, NUM_ITEMS + 1)
TARGETS = torch.tensor([7, 2, 9])
NEGATIVES = torch.tensor([1, 2, 9, 9, 15])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sigm(score):
    return torch.sigmoid(score)


def mean(terms):
    return sum(terms) / len(NEGATIVES)


def shares(scores):
    total = sum(score.exp() for score in scores)
    return [score.exp() / total for score in scores]


def naive_bce(positive, scores):
    return -(logsigmoid(positive) + sum(logsigmoid(-s) for s in scores) / 5) / 2


def naive_full_bce(positive, scores, beta=1.0):
    return -(beta * logsigmoid(positive) + sum(logsigmoid(-s) for s in scores)) / 6


def naive_gbce(positive, scores):
    rate = 5 / (NUM_ITEMS - 1)
    return naive_full_bce(positive, scores, beta=rate * (0.75 * (1 - 1 / rate) + 1 / rate))


def naive_balanced_gbce(positive, scores):
    rate = 5 / (NUM_ITEMS - 1)
    begin = math.log((rate * (0.75 * (1 - 1 / rate) + 1 / rate)) / 5)
    return naive_gbce(positive + begin, [s + begin for s in scores])


def naive_bpr(positive, scores):
    return -mean([logsigmoid(positive - s) for s in scores])


def naive_top1(positive, scores):
    return mean([sigm(s - positive) + sigm(s**2) for s in scores])


def naive_top1_max(positive, scores):
    terms = zip(shares(scores), scores, strict=True)
    return sum(p * (sigm(s - positive) + sigm(s**2)) for p, s in terms)


def naive_bpr_max(positive, scores):
    weights = shares(scores)
    beaten = sum(p * sigm(positive - s) for p, s in zip(weights, scores, strict=True))
    return -beaten.log() + 0.4 * sum(p * s**2 for p, s in zip(weights, scores, strict=True))


def naive_softmax(positive, scores):
    return (positive.exp() + sum(s.exp() for s in scores)).log() - positive


def naive_log_q(positive, scores):
    return naive_softmax(positive, [s - math.log(5 / NUM_ITEMS) for s in scores])


FORMULAS = {
    "bce": (BinaryCrossEntropy.Config(num_negatives=5), naive_bce),
    "bce over all": (BinaryCrossEntropy.Config(num_negatives=5, negatives_per_target=None), naive_full_bce),
    "gbce": (GeneralisedBinaryCrossEntropy.Config(num_negatives=5), naive_balanced_gbce),
    "gbce of the paper": (GeneralisedBinaryCrossEntropy.Config(num_negatives=5, balanced=False), naive_gbce),
    "gbce without calibration": (
        GeneralisedBinaryCrossEntropy.Config(num_negatives=5, calibration=0.0, balanced=False),
        naive_full_bce,
    ),
    "bpr": (BayesianPersonalisedRanking.Config(num_negatives=5), naive_bpr),
    "top1": (Top1.Config(num_negatives=5), naive_top1),
    "top1-max": (Top1Max.Config(num_negatives=5), naive_top1_max),
    "bpr-max": (BprMax.Config(num_negatives=5, regularisation=0.4), naive_bpr_max),
    "sampled softmax": (SampledSoftmax.Config(num_negatives=5), naive_softmax),
    "sampled softmax, log q": (SampledSoftmax.Config(num_negatives=5, log_q=True), naive_log_q),
}


def score(state, row, scoring):
    scale = state.norm() * row.norm() if scoring.normalised else 1.0
    return (state * row).sum() / scale / scoring.temperature


def assert_same(actual, expected, inputs):
    """Equal losses and gradients."""
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    for own, naive in zip(
        torch.autograd.grad(actual, inputs, retain_graph=True),
        torch.autograd.grad(expected, inputs),
        strict=True,
    ):
        torch.testing.assert_close(own, naive, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_an_objective_over_shared_negatives_is_its_formula(name, normalised):
    config, formula = FORMULAS[name]
    config = dataclasses.replace(config, normalised=normalised, temperature=0.5)
    objective = config.build(num_items=NUM_ITEMS)
    # An item drawn twice has one row, to which all its gradients go.
    states, target_rows, table = random(3, 4), random(3, 4, seed=1), random(NUM_ITEMS, 4, seed=2)
    inputs = [tensor.requires_grad_() for tensor in (states, target_rows, table)]
    rows = table[NEGATIVES]
    loss = objective(
        objective.queries(states),
        TARGETS,
        {"target": objective.candidates(target_rows), "negative": objective.candidates(rows)},
        {"target": TARGETS, "negative": NEGATIVES},
        CONTEXT,
    )
    expected = 0.0
    for t in range(3):
        others = [score(states[t], rows[j], config) for j in range(5) if NEGATIVES[j] != TARGETS[t]]
        expected = expected + formula(score(states[t], target_rows[t], config), others)
    assert loss.count == 3
    assert_same(loss.sum, expected, inputs)


@pytest.mark.parametrize("log_q", [False, True])
def test_the_softmax_over_the_batch_is_its_formula(log_q):
    objective = InBatchSoftmax.Config(log_q=log_q, temperature=0.5).build(
        num_items=NUM_ITEMS, item_counts=COUNTS
    )
    targets = torch.tensor([3, 11, 3, 8])
    states, table = random(4, 3).requires_grad_(), random(NUM_ITEMS, 3, seed=1).requires_grad_()
    rows = table[targets]
    loss = objective(objective.queries(states), targets, {"target": objective.candidates(rows)}, {}, CONTEXT)
    expected = 0.0
    for t in range(4):
        positive = score(states[t], rows[t], objective.scoring)
        total = positive.exp()
        for u in range(4):
            if targets[u] != targets[t]:
                draws = 4 * COUNTS[targets[u]] / COUNTS.sum() if log_q else 1.0
                total = total + score(states[t], rows[u], objective.scoring).exp() / draws
        expected = expected + total.log() - positive
    assert_same(loss.sum, expected, [states, table])


def test_full_softmax_is_its_formula():
    objective = FullSoftmax.Config(normalised=False, temperature=2.0).build(num_items=6)
    states, rows, targets = random(2, 3), random(6, 3, seed=1), torch.tensor([5, 0])
    loss = objective(objective.queries(states), targets, {"vocabulary": rows}, {}, CONTEXT)
    expected = 0.0
    for t in range(2):
        scores = [(states[t] @ rows[j]).item() / 2.0 for j in range(6)]
        expected += math.log(sum(math.exp(s) for s in scores)) - scores[int(targets[t])]
    assert loss.sum.item() == pytest.approx(expected, rel=1e-5)


def test_with_all_items_as_negatives_and_log_q_the_sampled_softmax_is_the_full_one():
    rows, states, targets = random(8, 4), random(3, 4, seed=1), torch.tensor([1, 4, 6])
    sampled = SampledSoftmax.Config(num_negatives=8, log_q=True).build(num_items=8)
    full = FullSoftmax.Config().build(num_items=8)
    queries, vectors = sampled.queries(states), sampled.candidates(rows)
    everything = torch.arange(8)
    first = sampled(
        queries, targets, {"target": vectors[targets], "negative": vectors}, {"negative": everything}, CONTEXT
    )
    second = full(queries, targets, {"vocabulary": vectors}, {}, CONTEXT)
    torch.testing.assert_close(first.sum, second.sum)


@pytest.mark.parametrize("num_targets", [0, 6])
@pytest.mark.parametrize("name", objective_names())
def test_every_objective_trains_and_bears_a_rank_without_users(name, num_targets):
    config = plugin_config(OBJECTIVES, name)()
    counts = {"item_counts": COUNTS} if config.needs_item_counts else {}
    objective = config.build(num_items=NUM_ITEMS, **counts)
    assert not list(objective.parameters()) and not objective.state_dict()
    targets = torch.arange(num_targets) * 3
    ids = objective.ids(targets, CONTEXT)
    assert ids.keys() == set(objective.features)
    states = random(num_targets, 4).requires_grad_()
    table = random(NUM_ITEMS, 4, seed=1).requires_grad_()
    vectors = {name: objective.candidates(table[entry]) for name, entry in ids.items()}
    loss = objective(objective.queries(states), targets, vectors, ids, CONTEXT)
    loss.sum.backward()
    assert loss.count == num_targets and loss.sum.shape == ()
    assert states.grad.isfinite().all() and table.grad.isfinite().all()
    if num_targets:
        assert loss.sum > 0 and states.grad.any() and table.grad.any()
    else:
        assert loss.sum == 0 and not table.grad.any()


def test_a_calibration_outside_of_0_to_1_is_refused():
    with pytest.raises(ConfigError, match=r"objective.calibration must lie in 0..1, got 1.5"):
        GeneralisedBinaryCrossEntropy.Config(calibration=1.5)


def test_negatives_must_weigh_something():
    with pytest.raises(ConfigError, match=r"objective.negatives-per-target must be above 0, or None, got -1"):
        BinaryCrossEntropy.Config(negatives_per_target=-1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("name", objective_names())
def test_scores_cannot_be_divided_by_nothing(name, temperature):
    with pytest.raises(ConfigError, match=r"objective.temperature must be above 0, .* got"):
        plugin_config(OBJECTIVES, name)(temperature=temperature)
