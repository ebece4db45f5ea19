"""Attention to a context whose tokens are known from some position on, against the written-out form."""

from itertools import pairwise

import pytest
import torch

from data_streams.jagged import Jagged
from models.kernels import context_attention as kernel
from models.kernels.context_attention import (
    NEVER,
    ContextCells,
    ContextLayout,
    context_attention,
    reference_context_attention,
)
from models.kernels.length_buckets import padded_layout

KEYS, TARGETS = (5, 40, 1, 9, 44), (2, 7, 1, 0, 40)
HEADS, GROUPS, LEVELS, DIM = 4, 2, 3, 6


def case():
    generator = torch.Generator().manual_seed(0)
    random = lambda *size: torch.randn(*size, generator=generator, requires_grad=True)  # noqa: E731
    sequences = Jagged.from_lengths(torch.zeros(sum(KEYS)), torch.tensor(KEYS))
    lengths = torch.tensor(TARGETS)
    positions = Jagged.from_lengths(torch.randint(1, 45, (sum(TARGETS),), generator=generator), lengths)
    since = torch.randint(0, 40, (sum(KEYS),), generator=generator)
    until = since + torch.randint(1, 20, since.shape, generator=generator)
    firsts = sequences.offsets[:-1]
    since[firsts], until[firsts] = 0, NEVER
    queries = random(sum(TARGETS), LEVELS, HEADS, DIM)
    return (
        sequences,
        positions,
        since,
        until,
        queries,
        random(sum(KEYS), GROUPS, DIM),
        random(sum(KEYS), GROUPS, DIM),
    )


def on_an_accelerator(monkeypatch):
    monkeypatch.setattr(kernel, "bucket_layout", padded_layout)
    monkeypatch.setattr(kernel, "following_layout", lambda _, __, others: padded_layout(others))


@pytest.mark.parametrize("on_accelerator", [False, True])
def test_buckets_equal_the_written_out_form_forward_and_backward(on_accelerator, monkeypatch):
    sequences, positions, since, until, *parts = case()
    if on_accelerator:
        on_an_accelerator(monkeypatch)
    layout = ContextLayout.build(sequences, since, until, positions)
    users = sequences.row_index()
    sees = [
        torch.nonzero((users == user) & (since <= at) & (at < until))[:, 0].tolist()
        for user, at in zip(positions.row_index(), positions.values, strict=True)
    ]
    queries, keys, values = parts
    ours = context_attention(queries, ContextCells.build(keys, values, layout), layout)
    expected = reference_context_attention(*parts, sees)
    torch.testing.assert_close(ours, expected)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for own, other in zip(
        torch.autograd.grad((ours * weights).sum(), parts),
        torch.autograd.grad((expected * weights).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("on_accelerator", [False, True])
@pytest.mark.parametrize("lengths", [(), (3, 2)])
def test_without_targets_nothing_is_attended_to_and_gradients_exist(lengths, on_accelerator, monkeypatch):
    if on_accelerator:
        on_an_accelerator(monkeypatch)
    keys = torch.zeros(sum(lengths), dtype=torch.int64)
    lengths = torch.tensor(lengths, dtype=torch.int64)
    sequences = Jagged.from_lengths(keys, lengths)
    nothing = Jagged.from_lengths(keys[:0], torch.zeros_like(lengths))
    layout = ContextLayout.build(sequences, keys, keys + NEVER, nothing)
    parts = [
        torch.zeros(num, *size, requires_grad=True)
        for num, size in ((0, (LEVELS, HEADS, DIM)), (len(keys), (GROUPS, DIM)))
    ]
    queries, keys = parts
    attended = context_attention(queries, ContextCells.build(keys, keys, layout), layout)
    assert attended.shape == (0, LEVELS, HEADS, DIM)
    attended.sum().backward()
    assert all(part.grad is not None for part in parts)


@pytest.mark.parametrize("lengths", [(2, 3, 4), (40, 40, 40)])
def test_layers_with_one_target_per_user_share_a_context_forward_and_backward(lengths):
    num_users, num_keys = len(lengths), sum(lengths)
    sequences = Jagged.from_lengths(torch.arange(num_keys), torch.tensor(lengths))
    positions = Jagged.from_lengths(torch.full((num_users,), 9), torch.ones(num_users, dtype=torch.int64))
    since, until = sequences.places() % 2 * NEVER, torch.full((num_keys,), NEVER)
    layout = ContextLayout.build(sequences, since, until, positions)
    generator = torch.Generator().manual_seed(1)
    shapes = [(num_users, LEVELS, HEADS, DIM)] + [(num_keys, GROUPS, DIM)] * 2
    parts = [torch.randn(*shape, generator=generator, requires_grad=True) for shape in shapes]
    sees = [list(range(first, last, 2)) for first, last in pairwise(sequences.offsets.tolist())]
    queries, keys, values = parts
    cells = ContextCells.build(keys, values, layout)
    ours = expected = queries
    for _ in range(2):
        ours = ours + context_attention(ours, cells, layout)
        expected = expected + reference_context_attention(expected, keys, values, sees)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    for own, other in zip(
        torch.autograd.grad(ours.square().sum(), parts),
        torch.autograd.grad(expected.square().sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)
