"""Attention to a prefix of the user's context: against the loop, and that hidden keys leave no bit behind."""

import pytest
import torch

from data_streams.jagged import Jagged
from models.kernels import prefix_attention as kernel
from models.kernels.length_buckets import padded_layout
from models.kernels.prefix_attention import (
    NUM_AGE_BUCKETS,
    PrefixLayout,
    count_alike,
    prefix_attention,
    reference_prefix_attention,
)
from tests.pretended_device import PRETENDED, PretendedDevice, no_real_device

KEYS, QUERIES = torch.tensor([5, 0, 40, 0, 37]), torch.tensor([70, 2, 1, 0, 33])
"""A user without keys, one with nothing at all."""


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def users():
    """Queries that see any number of their user's keys, from none to all."""
    keys = Jagged.from_lengths(torch.arange(82), KEYS)
    generator = torch.Generator().manual_seed(3)
    most = KEYS.repeat_interleave(QUERIES)
    visible = (torch.rand(106, generator=generator) * (most + 1)).long()
    return Jagged.from_lengths(visible, QUERIES), keys


@pytest.fixture(params=["buckets", "padded"])
def layout(request, monkeypatch):
    """As on a processor, and as on an accelerator."""
    if request.param == "padded":
        monkeypatch.setattr(kernel, "bucket_layout", padded_layout)
        monkeypatch.setattr(
            kernel, "following_layout", lambda sequences, layout, others: padded_layout(others)
        )
    return PrefixLayout.build(*users())


@pytest.mark.parametrize("with_bias", [True, False])
def test_it_equals_the_loop_in_values_and_gradients(layout, with_bias):
    visible, keys = users()
    leaves = [random(106, 2, 4), random(82, 2, 4, seed=1), random(82, 2, 3, seed=2)]
    leaves = [leaf.requires_grad_() for leaf in [*leaves, *[random(2, NUM_AGE_BUCKETS)] * with_bias]]
    tensors, by_age = leaves[:3], leaves[3] if with_bias else None
    ours = prefix_attention(*tensors, layout, by_age)
    expected = reference_prefix_attention(*tensors, visible, keys, by_age)
    torch.testing.assert_close(ours, expected)
    assert (ours[visible.values == 0] == 0).all()
    weights = random(*ours.shape, seed=9)
    for own, reference in zip(
        torch.autograd.grad((ours * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-5)


@no_real_device
@pytest.mark.parametrize("with_bias", [True, False])
def test_in_half_precision_an_accelerator_computes_the_same(with_bias, monkeypatch):
    monkeypatch.setattr(kernel, "matmul_dtype", lambda tensor: torch.bfloat16)
    leaves = [random(106, 2, 4), random(82, 2, 4, seed=1), random(82, 2, 3, seed=2)]
    leaves = [leaf.requires_grad_() for leaf in [*leaves, *[random(2, NUM_AGE_BUCKETS)] * with_bias]]
    expected = reference_prefix_attention(*leaves[:3], *users(), leaves[3] if with_bias else None)
    with PretendedDevice():
        moved = [leaf.to(PRETENDED) for leaf in leaves]
        layout = PrefixLayout.build(*(sequences.to(PRETENDED) for sequences in users()))
        found = prefix_attention(*moved[:3], layout, moved[3] if with_bias else None).cpu()
        gradients = torch.autograd.grad(found.sum(), leaves)
    for own, wanted in zip(
        (found, *gradients), (expected, *torch.autograd.grad(expected.sum(), leaves)), strict=True
    ):
        assert (own - wanted).norm() < 0.01 * wanted.norm()


def test_what_is_hidden_leaves_no_bit(layout):
    visible, keys = users()
    queries, offered, values = random(106, 2, 4), random(82, 2, 4, seed=1), random(82, 2, 3, seed=2)
    before = prefix_attention(queries, offered, values, layout, None)
    # The last key of the first user, and one in the middle of the last.
    for key in (4, 60):
        others = [tensor.clone() for tensor in (offered, values)]
        for tensor in others:
            tensor[key] = 1e3
        after = prefix_attention(queries, *others, layout, None)
        row, place = keys.row_index()[key], keys.places()[key]
        sees = (visible.row_index() == row) & (visible.values > place)
        assert torch.equal(before[~sees], after[~sees])
        assert sees.any() and (before[sees] != after[sees]).flatten(1).any(-1).all()


def test_equal_items_are_counted_among_what_is_seen(layout):
    visible, keys = users()
    items, asked = torch.randint(3, (82,)), torch.randint(3, (106,))
    starts = keys.offsets[visible.row_index()]
    expected = [
        int((items[start : start + count] == item).sum())
        for start, count, item in zip(starts.tolist(), visible.values.tolist(), asked, strict=True)
    ]
    assert count_alike(asked, items, layout).tolist() == expected


def test_no_query_still_gives_every_part_a_gradient():
    nothing = Jagged.from_lengths(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    parts = [torch.zeros(0, 2, 4, requires_grad=True) for _ in range(3)]
    by_age = torch.zeros(2, NUM_AGE_BUCKETS, requires_grad=True)
    result = prefix_attention(*parts, PrefixLayout.build(nothing, nothing), by_age)
    assert result.shape == (0, 2, 4)
    gradients = torch.autograd.grad(result.sum(), [*parts, by_age])
    assert [gradient.shape for gradient in gradients] == [part.shape for part in (*parts, by_age)]
