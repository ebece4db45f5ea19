"""Keys and values of a context in blocks of rows against the written-out form."""

import pytest
import torch

from models.kernels import rms_norm as blocks
from models.kernels.context_keys import plain_turn_normed, turn_normed

GROUPS, DIM, TOKENS = 3, 4, 17


def parts():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(TOKENS, GROUPS * DIM, generator=generator, requires_grad=True)
    weight = torch.rand(GROUPS * DIM, generator=generator, requires_grad=True)
    return vectors, weight, torch.randint(0, 9, (TOKENS,), generator=generator)


@pytest.mark.parametrize("factors", [(1, 1), (1, 0), (0, 1)])
@pytest.mark.parametrize("block_elements", [5 * GROUPS * DIM, 2**19])
def test_blocks_equal_the_written_out_form_forward_and_backward(block_elements, factors, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
    vectors, weight, places = parts()
    ours = turn_normed(vectors, weight, places, groups=GROUPS)
    expected = plain_turn_normed(vectors, weight, places, groups=GROUPS)
    used = [number for number, factor in enumerate(factors) if factor]
    torch.testing.assert_close(ours, expected)
    numbers = torch.arange(float(TOKENS * GROUPS * DIM)).view(TOKENS, GROUPS, DIM).sin()
    losses = [
        sum((number + 1) * (both[number] * numbers).sum() for number in used) for both in (ours, expected)
    ]
    for own, other in zip(*(torch.autograd.grad(loss, (vectors, weight)) for loss in losses), strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [turn_normed, plain_turn_normed])
def test_in_bf16_they_come_in_bf16_and_close(side):
    vectors, weight, places = parts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = side(vectors.bfloat16(), weight, places, groups=GROUPS)
    for own, other in zip(ours, plain_turn_normed(vectors, weight, places, groups=GROUPS), strict=True):
        assert own.dtype == torch.bfloat16
        torch.testing.assert_close(own.float(), other, atol=0.03, rtol=0.03)


def test_no_tokens_have_no_keys():
    nothing = torch.zeros(0, GROUPS * DIM, requires_grad=True)
    keys, values = turn_normed(nothing, torch.ones(GROUPS * DIM), torch.zeros(0).long(), groups=GROUPS)
    assert keys.shape == values.shape == (0, GROUPS, DIM)
    (keys.sum() + values.sum()).backward()
    assert nothing.grad is not None
