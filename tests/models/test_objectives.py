"""Objectives against naive loops over the formula."""

import math

import pytest
import torch

from models.kernels.sampled_softmax import reference_shared_negative_softmax, shared_negative_softmax
from models.objectives.full_softmax import FullSoftmax
from models.objectives.sampled_softmax import SampledSoftmax
from models.recommender import StepContext

CONTEXT = StepContext(step=0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("log_q", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_sampled_softmax_is_its_formula(log_q, normalised):
    objective = SampledSoftmax.Config(
        num_negatives=5, log_q=log_q, normalised=normalised, temperature=0.5
    ).build(num_items=20)
    states, targets = random(3, 4), torch.tensor([7, 2, 9])
    negatives = torch.tensor([1, 2, 9, 9, 15])
    target_rows, negative_rows = random(3, 4, seed=1), random(5, 4, seed=2)
    loss = objective(
        objective.queries(states),
        targets,
        {"target": objective.candidates(target_rows), "negative": objective.candidates(negative_rows)},
        {"target": targets, "negative": negatives},
        CONTEXT,
    )

    def score(state, row):
        scale = (state.norm() * row.norm()) if normalised else 1.0
        return (state @ row / scale / 0.5).item()

    expected = 0.0
    for t in range(3):
        positive = score(states[t], target_rows[t])
        total = math.exp(positive)
        for j in range(5):
            if negatives[j] != targets[t]:
                expected_draws = 5 / 20
                corrected = score(states[t], negative_rows[j]) - (math.log(expected_draws) if log_q else 0)
                total += math.exp(corrected)
        expected += math.log(total) - positive
    assert loss.count == 3
    assert loss.sum.item() == pytest.approx(expected, rel=1e-5)


def test_full_softmax_is_its_formula():
    objective = FullSoftmax.Config(normalised=False, temperature=2.0).build(num_items=6)
    states, rows, targets = random(2, 3), random(6, 3, seed=1), torch.tensor([5, 0])
    loss = objective(objective.queries(states), targets, {"vocabulary": rows}, {}, CONTEXT)
    expected = 0.0
    for t in range(2):
        scores = [(states[t] @ rows[j]).item() / 2.0 for j in range(6)]
        expected += math.log(sum(math.exp(s) for s in scores)) - scores[int(targets[t])]
    assert loss.sum.item() == pytest.approx(expected, rel=1e-5)


def test_the_shared_negative_kernel_equals_the_reference_with_gradients():
    inputs = [
        random(4, 3).requires_grad_(),
        random(6, 3, seed=1).requires_grad_(),
        random(4, seed=2).requires_grad_(),
    ]
    excluded = random(4, 6, seed=3) > 1
    found = []
    for function in (shared_negative_softmax, reference_shared_negative_softmax):
        losses = function(*inputs, excluded, 0.3)
        found.append([losses, *torch.autograd.grad((losses * torch.arange(1, 5)).sum(), inputs)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


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
