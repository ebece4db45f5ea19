import math

import pytest
import torch
import torch.nn.functional as F

from data_streams.jagged import Jagged
from models.kernels.length_buckets import bucket_layout, padded_layout
from models.kernels.pointwise_attention import (
    EventPairs,
    PairBias,
    pointwise_attention,
    reference_pointwise_attention,
    time_buckets,
)
from tests.models.pointwise_cases import CASES, MAX_LENGTH, assert_equal_with_gradients, make_inputs


def both(lengths, make_layout, *, max_length=MAX_LENGTH, **kinds):
    qkv, bias, times_s, sequences = make_inputs(lengths, max_length=max_length, **kinds)
    times_of_pairs = None if bias.by_time is None else times_s
    pairs = EventPairs.in_cells(sequences, times_of_pairs, make_layout(sequences))
    packed = torch.cat(qkv, dim=-1)
    found = pointwise_attention(packed, 4, pairs, max_length=max_length, bias=bias)
    expected = reference_pointwise_attention(
        *qkv, sequences, max_length=max_length, bias=bias, times_s=times_s
    )
    leaves = [*qkv, *(weights for weights in (bias.by_distance, bias.by_time) if weights is not None)]
    return found, expected, leaves


@pytest.mark.parametrize("make_layout", [bucket_layout, padded_layout])
@pytest.mark.parametrize("lengths", CASES)
def test_buckets_and_the_dense_block_equal_the_reference_with_gradients(lengths, make_layout):
    assert_equal_with_gradients(*both(lengths, make_layout))


def test_a_bucket_may_be_longer_than_the_longest_history_there_may_be():
    lengths = [147, 143]
    (_, length), *_ = bucket_layout(make_inputs(lengths)[-1]).buckets
    assert length == 152
    assert_equal_with_gradients(*both(lengths, bucket_layout, max_length=150))


@pytest.mark.parametrize("kinds", [{"with_time": False}, {"with_distance": False, "with_time": False}])
def test_biases_can_be_left_out(kinds):
    found, expected, _ = both([5, 1, 9], bucket_layout, **kinds)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_two_events_by_hand():
    queries, keys = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[3.0]], [[0.5]]])
    values = torch.tensor([[[1.0]], [[10.0]]])
    bias = PairBias(by_distance=torch.tensor([0.1, 0.2, 0.3, 0.4]), by_time=None)
    sequences = Jagged.from_lengths(torch.zeros(2), torch.tensor([2]))
    packed = torch.cat((queries, keys, values), dim=-1)
    pairs = EventPairs.in_cells(sequences, None, bucket_layout(sequences))
    found = pointwise_attention(packed, 1, pairs, max_length=4, bias=bias)
    silu = lambda score: score / (1 + math.exp(-score))  # noqa: E731
    first = silu(3.1) / 4
    second = (silu(6.2) * 1 + silu(1.1) * 10) / 4
    assert found.flatten().tolist() == pytest.approx([first, second], abs=1e-5)


def test_the_weights_do_not_depend_on_who_else_is_in_the_batch():
    qkv, bias, _, _ = make_inputs([3, 30])
    alone = Jagged.from_lengths(torch.zeros(3), torch.tensor([3]))
    both_users = Jagged.from_lengths(torch.zeros(33), torch.tensor([3, 30]))
    bias = PairBias(by_distance=bias.by_distance, by_time=None)
    outputs = [
        pointwise_attention(
            torch.cat(qkv, dim=-1)[: users.values.shape[0]],
            4,
            EventPairs.in_cells(users, None, bucket_layout(users)),
            max_length=MAX_LENGTH,
            bias=bias,
        )[:3]
        for users in (alone, both_users)
    ]
    torch.testing.assert_close(*outputs, atol=1e-7, rtol=1e-5)


def test_time_buckets_are_logarithms_of_seconds():
    seconds = torch.tensor([0, 1, 2, 86_400, -86_400, 10**18])
    expected = [0, 0, math.floor(math.log(2) / 0.301), math.floor(math.log(86_400) / 0.301)]
    assert time_buckets(seconds, torch.tensor(0)).tolist() == [*expected, expected[3], 128]


def test_no_events_give_no_output_but_a_gradient_path():
    qkv, bias, _, sequences = make_inputs([0, 0])
    packed = torch.cat(qkv, dim=-1)
    pairs = EventPairs.in_cells(sequences, None, bucket_layout(sequences))
    found = pointwise_attention(packed, 4, pairs, max_length=MAX_LENGTH, bias=bias)
    assert found.shape == (0, 2, 3)
    assert found.requires_grad


def test_a_score_that_must_not_be_seen_has_no_weight_and_no_gradient():
    score = torch.tensor(-1e4 + 300.0, requires_grad=True)
    weight = F.silu(score)
    weight.backward()
    assert weight.item() == 0 and score.grad.item() == 0
