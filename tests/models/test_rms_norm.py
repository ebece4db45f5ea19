"""The norm in blocks of rows against that of torch."""

import pytest
import torch
import torch.nn.functional as F

from models.kernels import rms_norm as kernel
from models.layers.norm import RMSNorm

ROWS, WIDTH = 37, 12


@pytest.mark.parametrize("block_elements", [5 * WIDTH, 2**18])
def test_blocks_equal_the_norm_of_torch_forward_and_backward(block_elements, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK_ELEMENTS", block_elements)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True)
    weight = torch.rand(WIDTH, generator=generator, requires_grad=True)
    gradient = torch.randn(ROWS, WIDTH, generator=generator)
    ours = kernel.rms_norm(rows, weight)
    expected = F.rms_norm(rows, (WIDTH,), weight, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(ours, expected)
    both = (torch.autograd.grad(result, (rows, weight), gradient) for result in (ours, expected))
    for own, other in zip(*both, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5, WIDTH), (0, WIDTH)])
def test_under_autocast_it_gives_what_matrix_products_read(shape):
    rows, norm = torch.randn(shape, requires_grad=True), RMSNorm(WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normed = norm(rows)
    assert normed.dtype == torch.bfloat16 and normed.shape == shape
    torch.testing.assert_close(normed.float(), F.rms_norm(rows, (WIDTH,)), atol=0.03, rtol=0.03)
    normed.sum().backward()
    assert rows.grad.dtype == torch.float32 and norm.weight.grad is not None
