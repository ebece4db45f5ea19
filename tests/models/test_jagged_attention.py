import pytest
import torch

from data_streams.jagged import Jagged
from models.kernels import jagged_attention as kernel
from models.kernels.length_buckets import bucket_layout, padded_layout

CASES = [[1], [3, 3, 3], [5, 1, 9, 2, 2, 30, 29], [0, 4, 0, 7], list(range(1, 40))]


def make_inputs(lengths, heads=2, dim=4):
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)
    qkv = [torch.randn(total, heads, dim, generator=generator, requires_grad=True) for _ in range(3)]
    return qkv, Jagged.from_lengths(torch.zeros(total), torch.tensor(lengths))


@pytest.mark.parametrize("lengths", CASES)
def test_buckets_equal_the_reference_with_gradients(lengths):
    qkv, sequences = make_inputs(lengths)
    weights = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1))
    outputs = (
        kernel.jagged_attention(*qkv, bucket_layout(sequences)),
        kernel.reference_attention(*qkv, sequences),
    )
    found = [[output, *torch.autograd.grad((output * weights).sum(), qkv)] for output in outputs]
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lengths", CASES)
def test_the_accelerators_layout_equals_the_reference(lengths):
    qkv, sequences = make_inputs(lengths)
    layout = padded_layout(sequences)
    expected = kernel.reference_attention(*qkv, sequences)
    torch.testing.assert_close(kernel.jagged_attention(*qkv, layout), expected, atol=1e-5, rtol=1e-4)


def test_at_most_a_tenth_of_the_cells_is_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (300,), generator=generator)
    layout = bucket_layout(Jagged.from_lengths(torch.zeros(int(lengths.sum())), lengths))
    cells = sum(users * length for users, length in layout.buckets)
    assert cells == len(layout.token_of_cell)
    assert int(lengths.sum()) >= 0.9 * cells
    assert len(layout.buckets) < 60


def test_no_tokens_give_no_output():
    qkv, sequences = make_inputs([0, 0])
    assert kernel.jagged_attention(*qkv, bucket_layout(sequences)).shape == (0, 2, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator of CUDA")
def test_in_half_precision_on_cuda_nothing_is_padded_and_the_result_is_that_of_the_reference():
    qkv, sequences = make_inputs([0, 130, 1, 0, 64, 7], dim=16)
    weights = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1))
    rounded = [part.detach().bfloat16().cuda().requires_grad_() for part in qkv]
    layout = bucket_layout(sequences.to(torch.device("cuda")))
    with torch.profiler.profile() as profile:
        attended = kernel.jagged_attention(*rounded, layout).float().cpu()
    expected = kernel.reference_attention(*(part.float().cpu() for part in rounded), sequences)
    found = [
        [output, *torch.autograd.grad((output * weights).sum(), rounded)] for output in (attended, expected)
    ]
    for actual, wanted in zip(*found, strict=True):
        assert (actual - wanted).float().norm() < 0.01 * wanted.float().norm()
    assert any("varlen" in event.key for event in profile.key_averages())
