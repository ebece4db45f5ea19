"""Inputs of pointwise attention, and what its kernels are held to."""

import torch

from data_streams.jagged import Jagged
from models.kernels.pointwise_attention import PairBias

CASES = [[1], [3, 3, 3], [5, 1, 9, 2, 2, 30, 29], [0, 4, 0, 7], list(range(1, 40))]
MAX_LENGTH = 40


def make_inputs(lengths, *, max_length=MAX_LENGTH, with_distance=True, with_time=True):
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)
    draw = lambda *shape: torch.randn(*shape, generator=generator).requires_grad_()  # noqa: E731
    times_s = torch.randint(10_000_000, (total,), generator=generator)
    bias = PairBias(
        by_distance=draw(max_length) if with_distance else None, by_time=draw(129) if with_time else None
    )
    qkv = [draw(total, 2, 4), draw(total, 2, 4), draw(total, 2, 3)]
    return qkv, bias, times_s, Jagged.from_lengths(torch.zeros(total), torch.tensor(lengths))


def assert_equal_with_gradients(found, expected, leaves):
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((output * weights).sum(), leaves) for output in (found, expected)]
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)
