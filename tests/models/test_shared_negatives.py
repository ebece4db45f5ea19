"""Losses over shared negatives: as computed, block by block with their derivatives, and in plain operators."""

from functools import partial

import pytest
import torch

from models.kernels import pairwise_losses as losses
from models.kernels import shared_negatives
from models.kernels.sampled_softmax import reference_softmax, shared_negative_softmax
from models.kernels.shared_negatives import shared_negative_loss

PAIRS = {
    "binary": (
        partial(losses.binary_cross_entropy, 0.3, 0.2),
        partial(losses.reference_binary_cross_entropy, 0.3, 0.2),
    ),
    "bpr": (losses.bpr, losses.reference_bpr),
    "top1": (losses.top1, losses.reference_top1),
    "top1-max": (losses.top1_max, losses.reference_top1_max),
    "bpr-max": (partial(losses.bpr_max, 0.7), partial(losses.reference_bpr_max, 0.7)),
}
WEIGHTS = torch.linspace(0.2, 3.0, 37)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(num_queries=150, scale=1.0):
    """Queries, negatives and positive scores with gradients; targets and ids, of which some are equal."""
    inputs = [random(num_queries, 6) * scale, random(37, 6, seed=1), random(num_queries, seed=2) * scale]
    targets = torch.arange(num_queries) % 50
    return [tensor.requires_grad_() for tensor in inputs], targets, torch.arange(37)


def with_gradients(loss, inputs):
    return [loss, *torch.autograd.grad(loss * 1.7, inputs)]


def computed(name, inputs, targets, ids):
    if name == "softmax":
        return shared_negative_softmax(*inputs, targets, ids, WEIGHTS)
    return shared_negative_loss(*inputs, targets, ids, PAIRS[name][0])


def plain(name, inputs, targets, ids):
    scores, excluded = inputs[0] @ inputs[1].T, targets[:, None] == ids
    if name == "softmax":
        return reference_softmax(scores, inputs[2], excluded, WEIGHTS).sum()
    return PAIRS[name][1](scores, inputs[2], excluded).sum()


@pytest.mark.parametrize("name", ["softmax", *PAIRS])
def test_a_loss_in_blocks_equals_its_reference_with_gradients(name, monkeypatch):
    monkeypatch.setitem(shared_negatives.BLOCK_CELLS, "cpu", 64 * 37)
    inputs, targets, ids = case()
    found = with_gradients(computed(name, inputs, targets, ids), inputs)
    expected = with_gradients(plain(name, inputs, targets, ids), inputs)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["softmax", *PAIRS])
def test_a_loss_in_bf16_is_close_to_its_reference(name):
    inputs, targets, ids = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(computed(name, inputs, targets, ids), inputs)
    expected = with_gradients(plain(name, inputs, targets, ids), inputs)
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.parametrize("name", ["softmax", *PAIRS])
def test_huge_scores_stay_finite(name):
    inputs, targets, ids = case(scale=1e3)
    for tensor in with_gradients(computed(name, inputs, targets, ids), inputs):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("name", PAIRS)
def test_a_query_whose_only_negative_is_its_target_has_no_negatives(name):
    inputs = [random(2, 3).requires_grad_(), random(1, 3, seed=1).requires_grad_(), torch.zeros(2)]
    loss = shared_negative_loss(*inputs, torch.tensor([4, 4]), torch.tensor([4]), PAIRS[name][0])
    to_queries, to_negatives = torch.autograd.grad(loss, inputs[:2])
    assert loss.isfinite() and not to_queries.any() and not to_negatives.any()
