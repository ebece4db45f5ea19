"""Products of experts expert by expert against grouped ones."""

import pytest
import torch

from models.kernels import expert_products as kernel
from models.kernels.expert_products import expert_products, grouped_products

WIDTH, HIDDEN = 16, 24
ENDS = torch.tensor([0, 7, 7, 40, 56], dtype=torch.int32)
"""The first and the third expert have no rows."""


def both_ways(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((56, WIDTH), (5, WIDTH, 2 * HIDDEN), (5, HIDDEN, WIDTH))
    parts = [torch.randn(*shape, generator=generator, requires_grad=True) for shape in shapes]
    weights = torch.randn(56, WIDTH, generator=generator)
    for compute in (expert_products, grouped_products):
        outputs = compute(parts[0].to(dtype), *parts[1:], ENDS)
        yield outputs, torch.autograd.grad((outputs * weights).sum(), parts)


@pytest.mark.parametrize("block_rows", [8, 512])
def test_expert_by_expert_equals_grouped_products_forward_and_backward(block_rows, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK_ROWS", block_rows)
    (ours, our_gradients), (theirs, their_gradients) = both_ways(torch.float32)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for own, other in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


def test_in_bf16_both_are_alike_and_weights_have_gradients_in_their_own_dtype():
    (ours, our_gradients), (theirs, their_gradients) = both_ways(torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    for own, other in zip((ours, *our_gradients), (theirs, *their_gradients), strict=True):
        assert own.dtype == other.dtype
        assert (own - other).norm() < 0.01 * other.norm()


def test_what_is_kept_for_the_backward_pass_can_be_let_go_by_activation_checkpointing():
    kept = []
    parts = [
        torch.randn(*shape, requires_grad=True) for shape in ((56, WIDTH), (5, WIDTH, 48), (5, HIDDEN, WIDTH))
    ]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape), lambda shape: None
    ):
        outputs = expert_products(*parts, ENDS)
    # Both factors of the gate, of each of the three experts that have rows.
    assert kept[3:] == [(7, 48), (7, HIDDEN), (33, 48), (33, HIDDEN), (16, 48), (16, HIDDEN)]
    assert not [
        name for name, value in vars(outputs.grad_fn).items() if name == "hidden" or torch.is_tensor(value)
    ]
