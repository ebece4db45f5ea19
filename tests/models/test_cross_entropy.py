import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.kernels import cross_entropy as kernel
from models.kernels.sampled_softmax import shared_negative_softmax


def make_inputs(num_queries, num_candidates, scale=1.0):
    generator = torch.Generator().manual_seed(num_queries)
    queries = (torch.randn(num_queries, 8, generator=generator) * scale).requires_grad_()
    candidates = torch.randn(num_candidates, 8, generator=generator).requires_grad_()
    return queries, candidates, torch.randint(num_candidates, (num_queries,), generator=generator)


@pytest.mark.parametrize("num_queries", [1, 64, 65, 300])
def test_blocks_equal_plain_operators_with_gradients(num_queries, monkeypatch):
    # Several blocks of 64 queries.
    monkeypatch.setitem(kernel.BLOCK_CELLS, "cpu", 1)
    queries, candidates, targets = make_inputs(num_queries, 50)
    sides = (kernel.candidate_cross_entropy, kernel.reference_cross_entropy)
    losses = [side(queries, candidates, targets, 50) for side in sides]
    gradients = [torch.autograd.grad(0.3 * loss, (queries, candidates)) for loss in losses]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-5)
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_bf16_stays_close_to_fp32():
    queries, candidates, targets = make_inputs(200, 500)
    exact = kernel.candidate_cross_entropy(queries, candidates, targets, 500)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = kernel.candidate_cross_entropy(queries, candidates, targets, 500)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=0)


def full(queries, candidates, targets):
    return kernel.candidate_cross_entropy(queries, candidates, targets, len(candidates))


def sampled(queries, candidates, targets):
    positive, weights = torch.zeros(len(queries)), torch.ones(len(candidates))
    return shared_negative_softmax(
        queries, candidates, positive, targets, torch.arange(len(candidates)), weights
    )


class Roundings(TorchDispatchMode):
    """Counts the tensors of scores that are rounded to bf16."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function == torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.count += result.numel() >= 64 * 128
        return result


@pytest.mark.parametrize("side", [full, sampled])
def test_shares_that_autocast_makes_fp32_are_rounded_once(side, monkeypatch):
    # As on CUDA.
    monkeypatch.setattr(torch.Tensor, "softmax", lambda scores, dim: torch.softmax(scores.float(), dim))
    with Roundings() as roundings, torch.autocast("cpu", dtype=torch.bfloat16):
        side(*make_inputs(64, 128))
    assert roundings.count == 1


def test_a_hopeless_target_has_a_finite_loss_and_the_gradient_of_its_miss():
    queries, candidates, targets = make_inputs(3, 20, scale=500.0)
    loss = kernel.candidate_cross_entropy(queries, candidates, targets, 20)
    expected = kernel.reference_cross_entropy(queries, candidates, targets, 20)
    assert loss.isfinite() and 87 < loss <= expected + 1e-3
    actual, wanted = (torch.autograd.grad(side, queries)[0] for side in (loss, expected))
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


def test_no_queries_have_no_loss_but_a_gradient_path():
    queries, candidates, targets = make_inputs(0, 20)
    loss = kernel.candidate_cross_entropy(queries, candidates, targets, 20)
    loss.backward()
    assert loss.item() == 0 and not candidates.grad.any()
