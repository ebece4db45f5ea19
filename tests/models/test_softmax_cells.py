"""Attention within cells against plain operators, forward and backward, and what no query may notice."""

import pytest
import torch

from models.kernels.softmax_cells import HIDDEN, attend_cells, hidden_bias

USERS, HEADS, QUERIES, KEYS, DIM = 3, 2, 5, 4, 8


def case():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).requires_grad_()  # noqa: E731
    parts = draw(USERS, HEADS, QUERIES, DIM), draw(USERS, HEADS, KEYS, DIM), draw(USERS, HEADS, KEYS, DIM)
    hidden = torch.rand(USERS, 1, QUERIES, KEYS, generator=generator) < 0.4
    hidden[..., 0] = False
    return parts, hidden, draw(1, HEADS, QUERIES, KEYS)


def plain(queries, keys, values, hidden, bias):
    scores = queries @ keys.transpose(2, 3) / DIM**0.5 + bias
    scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ values, scores.logsumexp(-1, keepdim=True)


@pytest.mark.parametrize("with_bias", [False, True])
def test_results_and_gradients_are_those_of_plain_operators(with_bias):
    parts, hidden, bias = case()
    weights = torch.randn(USERS, HEADS, QUERIES, DIM + 1, generator=torch.Generator().manual_seed(1))
    leaves = (*parts, bias) if with_bias else parts
    found = attend_cells(*parts, hidden_bias(hidden), bias if with_bias else None)
    expected = plain(*parts, hidden, bias if with_bias else torch.zeros(()))
    gradients = []
    for attended, log_sum in (found, expected):
        joined = torch.cat((attended, log_sum), dim=-1)
        gradients.append(torch.autograd.grad((joined * weights).sum(), leaves))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*gradients)


def test_no_bit_depends_on_what_is_hidden():
    parts, hidden, _ = case()
    hidden[:, :, :, 2] = True
    before = attend_cells(*parts, hidden_bias(hidden))
    changed = [part.detach().clone() for part in parts]
    for part in changed[1:]:
        part[:, :, 2] = 1e3
    after = attend_cells(*changed, hidden_bias(hidden))
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    gradients = torch.autograd.grad(before[0].sum() + before[1].sum(), parts[1:])
    assert not any(part[:, :, 2].any() for part in gradients)


def test_a_query_that_sees_nothing_says_so_and_stays_finite():
    parts, hidden, _ = case()
    hidden[1] = True
    attended, log_sum = attend_cells(*parts, hidden_bias(hidden))
    assert (log_sum[1] < HIDDEN / 2).all() and (log_sum[[0, 2]] > HIDDEN / 2).all()
    torch.testing.assert_close(attended[1], parts[2][1].mean(1, keepdim=True).expand(-1, QUERIES, -1))


def test_products_are_in_the_type_of_autocast_and_the_logarithm_is_not():
    parts = [torch.randn(1, 1, 40, DIM) for _ in range(3)]
    hidden = hidden_bias(torch.ones(40, 40).triu(1).bool())
    exact = attend_cells(*parts, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attended, log_sum = attend_cells(*parts, hidden)
    assert attended.dtype == torch.bfloat16 and log_sum.dtype == torch.float32
    torch.testing.assert_close((attended.float(), log_sum), exact, rtol=2e-2, atol=2e-2)
