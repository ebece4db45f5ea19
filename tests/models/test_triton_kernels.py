"""The Triton kernels compute what their references do: on an accelerator, elsewhere in Triton's interpreter."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models.kernels import triton
from models.kernels.pointwise_attention import (
    EventPairs,
    PairBias,
    pointwise_attention,
    reference_pointwise_attention,
)
from tests.models.pointwise_cases import CASES, MAX_LENGTH, assert_equal_with_gradients, make_inputs
from tests.training_cases import Case, join_pieces, train

pytest.importorskip(
    "triton", reason="Triton is not installed: a CUDA build of torch or requirements-dev.txt has it"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
"""The interpreter computes with the bits of bf16 as if they were integers."""


def attend_jagged(qkv, bias, times_s, sequences, max_length=MAX_LENGTH):
    """On the device, back on the host; gradients flow to the inputs there."""
    moved = PairBias(
        by_distance=None if bias.by_distance is None else bias.by_distance.to(DEVICE),
        by_time=None if bias.by_time is None else bias.by_time.to(DEVICE),
    )
    pairs = EventPairs(sequences=sequences.to(DEVICE), times_s=times_s.to(DEVICE), layout=None)
    packed = torch.cat(qkv, dim=-1).to(DEVICE)
    return pointwise_attention(packed, qkv[0].shape[-1], pairs, max_length=max_length, bias=moved).cpu()


def assert_equals_reference(lengths, *, max_length=MAX_LENGTH, **kinds):
    qkv, bias, times_s, sequences = make_inputs(lengths, max_length=max_length, **kinds)
    found = attend_jagged(qkv, bias, times_s, sequences, max_length)
    expected = reference_pointwise_attention(
        *qkv, sequences, max_length=max_length, bias=bias, times_s=times_s
    )
    leaves = [*qkv, *(weights for weights in (bias.by_distance, bias.by_time) if weights is not None)]
    assert_equal_with_gradients(found, expected, leaves)


@pytest.mark.parametrize("lengths", CASES[:4])
def test_pointwise_attention_equals_the_reference_with_gradients(lengths):
    assert_equals_reference(lengths)


def test_users_of_several_blocks_meet_all_of_their_own_events_and_no_others():
    assert_equals_reference([70, 3, 65], max_length=80)


@pytest.mark.parametrize(
    "kinds", [{"with_time": False}, {"with_distance": False}, {"with_distance": False, "with_time": False}]
)
def test_biases_can_be_left_out(kinds):
    assert_equals_reference([5, 1, 40], **kinds)


def test_times_too_far_apart_for_32_bits_count_as_the_furthest_that_are_not():
    qkv, bias, _, sequences = make_inputs([4])
    times_s = torch.tensor([10**12, 10**12 + 7, 10**12 + 2**31 + 9, 10**12 + 2**33])
    found = attend_jagged(qkv, bias, times_s, sequences)
    nearer = times_s.clamp(max=10**12 + 2**31 - 1)
    expected = reference_pointwise_attention(
        *qkv, sequences, max_length=MAX_LENGTH, bias=bias, times_s=nearer
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_in_half_precision_sums_are_kept_in_single_precision():
    qkv, bias, times_s, sequences = make_inputs([40, 7, 33])
    rounded = [part.detach().to(HALF).requires_grad_() for part in qkv]
    found = attend_jagged(rounded, bias, times_s, sequences).float()
    expected = reference_pointwise_attention(
        *(part.float() for part in rounded), sequences, max_length=MAX_LENGTH, bias=bias, times_s=times_s
    )
    leaves = [*rounded, bias.by_distance, bias.by_time]
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((output * weights).sum(), leaves) for output in (found, expected)]
    for actual, wanted in zip((found, *gradients[0]), (expected, *gradients[1]), strict=True):
        assert (actual - wanted).float().norm() < 0.01 * wanted.float().norm()


def test_its_operations_are_counted_by_pairs_of_events():
    # A counter takes the formulas that are known when it is made.
    from models.kernels.triton import pointwise_attention as _  # noqa: F401

    qkv, bias, times_s, sequences = make_inputs([3, 1, 2])
    with FlopCounterMode(display=False) as forward:
        found = attend_jagged(qkv, bias, times_s, sequences)
    with FlopCounterMode(display=False) as backward:
        found.sum().backward()
    pairs, heads, attention_dim, value_dim = 6 + 1 + 3, 2, 4, 3
    assert forward.get_total_flops() == 2 * pairs * heads * (attention_dim + value_dim)
    assert backward.get_total_flops() == 2 * pairs * heads * (3 * attention_dim + 2 * value_dim)


def test_a_compiler_is_told_how_gradients_lie_in_memory():
    from models.kernels.triton.pointwise_attention import _backward

    # As they lie in memory, heads come before events.
    packed, gradient = (torch.randn(2, 6, size, device=DEVICE).transpose(0, 1) for size in (11, 3))
    arguments = (gradient, packed, torch.tensor([0, 4, 6], device=DEVICE), None, None, None, 4, 4, 0.1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        told, *_ = _backward(*arguments)
    found, *_ = _backward(*arguments)
    assert told.stride() == found.stride()


def test_hstu_trains_with_it_as_with_buckets(monkeypatch):
    case = Case(model="hstu", objective="full", steps=2, streams=4)
    expected, expected_state = train(None, case)
    monkeypatch.setattr(triton, "is_available", lambda device: True)
    losses, state = train(None, case, DEVICE)
    assert losses == pytest.approx(expected, rel=1e-5)
    found, wanted = join_pieces([state]), join_pieces([expected_state])
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.cpu(), wanted[name], atol=1e-4, rtol=1e-3, msg=name)
