"""Attention in which each query says what it sees, against the written-out form."""

import pytest
import torch

from data_streams.jagged import Jagged
from models.kernels.length_buckets import bucket_layout, padded_layout, to_cells
from models.kernels.masked_attention import (
    Extra,
    attend_last,
    masked_attention,
    matching_masks,
    prefix_masks,
    reference_masked_attention,
)

LENGTHS = (3, 40, 1, 0, 7, 40, 2)
HEADS, DIM = 2, 4


def case():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    tokens = int(lengths.sum())
    sequences = Jagged.from_lengths(torch.zeros(tokens), lengths)
    parts = [torch.randn(tokens, HEADS, DIM, generator=generator, requires_grad=True) for _ in range(5)]
    visible = (torch.rand(tokens, generator=generator) * (sequences.places() + 2)).long()
    offered = torch.randint(-1, 4, (tokens, 2), generator=generator)
    wanted = torch.randint(0, 5, (tokens,), generator=generator)
    return sequences, parts, visible, offered, wanted


def seen_by(sequences, visible, offered=None, wanted=None):
    """The tokens each query sees, query by query."""
    found = []
    for token, user in enumerate(sequences.row_index().tolist()):
        first = int(sequences.offsets[user])
        seen = list(range(first, first + int(visible[token])))
        if wanted is not None:
            fitting = [other for other in seen if int(wanted[token]) in offered[other].tolist()]
            seen = fitting or seen
        found.append(seen)
    return found


@pytest.mark.parametrize("layout_of", [bucket_layout, padded_layout])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("with_extra", [False, True])
def test_buckets_equal_the_written_out_form_forward_and_backward(layout_of, narrow, with_extra):
    sequences, (q, k, v, own_k, own_v), visible, offered, wanted = case()
    layout = layout_of(sequences)
    masks = prefix_masks(visible, layout)
    if narrow:
        masks = matching_masks(masks, wanted, offered, layout)
    extra = Extra(keys=own_k, values=own_v) if with_extra else None
    table = torch.randn(HEADS, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    bias = [
        table[:, (cells[:, :, 0, None] - torch.arange(cells.shape[1])).clamp(min=0)].transpose(0, 1)
        for cells in to_cells(sequences.places()[:, None], layout)
    ]
    sees = seen_by(sequences, visible, *((offered, wanted) if narrow else ()))
    firsts = sequences.offsets[sequences.row_index()]
    own_bias = [
        table[
            :,
            (sequences.places()[token] - (torch.tensor(seen, dtype=torch.int64) - firsts[token])).clamp(
                min=0
            ),
        ]
        for token, seen in enumerate(sees)
    ]
    leaves = (q, k, v, table, *((own_k, own_v) if with_extra else ()))
    found = masked_attention(q, k, v, masks, layout, bias=bias, extra=extra)
    expected = reference_masked_attention(q, k, v, sees, bias=own_bias, extra=extra)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    for one, other in zip(
        *(torch.autograd.grad((part * weights).sum(), leaves) for part in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_query_that_sees_nothing_gives_zero():
    sequences, (q, k, v, *_), visible, *_ = case()
    layout = bucket_layout(sequences)
    found = masked_attention(q, k, v, prefix_masks(torch.zeros_like(visible), layout), layout)
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("layout_of", [bucket_layout, padded_layout])
@pytest.mark.parametrize("with_extra", [False, True])
def test_several_queries_of_each_user_equal_the_written_out_form(layout_of, with_extra):
    sequences, (_, k, v, *_), _, offered, _ = case()
    generator, users, times = torch.Generator().manual_seed(3), len(LENGTHS), 3
    queries = torch.randn(users, times, HEADS, DIM, generator=generator)
    wanted = torch.randint(0, 5, (users, times), generator=generator)
    own = torch.randn(2, users * times, HEADS, DIM, generator=generator)
    extra = Extra(keys=own[0], values=own[1]) if with_extra else None
    found = attend_last(
        queries, k, v, sequences, layout_of(sequences), wanted=wanted, offered=offered, extra=extra
    )
    sees = []
    for user in range(users):
        tokens = list(range(int(sequences.offsets[user]), int(sequences.offsets[user + 1])))
        sees += [
            [token for token in tokens if one in offered[token].tolist()] or tokens
            for one in wanted[user].tolist()
        ]
    expected = reference_masked_attention(queries.flatten(0, 1), k, v, sees, extra=extra).view(queries.shape)
    expected[sequences.lengths == 0] = 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_no_users_give_no_states():
    sequences = Jagged.from_lengths(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    nothing = torch.zeros(0, HEADS, DIM)
    layout = bucket_layout(sequences)
    assert masked_attention(nothing, nothing, nothing, [], layout).shape == nothing.shape
    none = torch.zeros(0, 3, dtype=torch.int64)
    found = attend_last(
        nothing[:, None].expand(-1, 3, -1, -1), nothing, nothing, sequences, layout, wanted=none, offered=none
    )
    assert found.shape == (0, 3, HEADS, DIM)
