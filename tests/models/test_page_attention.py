"""Attention of pages over shared histories, against a loop."""

import pytest
import torch

from data_streams.jagged import Jagged
from models.kernels.page_attention import PageLayout, page_attention, reference_page_attention

HEADS, DIM = 2, 4


def make_case(num_users: int, longest: int = 50, most_pages: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high, count: torch.randint(1, high, (count,), generator=generator)  # noqa: E731
    lengths = draw(longest, num_users)
    history = Jagged.from_lengths(torch.zeros(int(lengths.sum())), lengths)
    per_user = torch.randint(most_pages + 1, (num_users,), generator=generator)
    users = torch.arange(num_users).repeat_interleave(per_user)
    visible = (torch.rand(len(users), generator=generator) * lengths[users]).long() + 1
    sizes = draw(12, len(users))
    pages = Jagged.from_lengths(torch.zeros(int(sizes.sum())), sizes)
    tokens = len(history.values) + len(pages.values)
    parts = [torch.randn(tokens, HEADS, DIM, generator=generator).requires_grad_() for _ in range(3)]
    return parts, history, pages, Jagged.from_lengths(visible, per_user)


@pytest.mark.parametrize("num_users", [1, 9])
def test_buckets_equal_the_loop_with_their_gradients(num_users):
    parts, *structure = make_case(num_users)
    expected = reference_page_attention(*parts, *structure)
    found = page_attention(*parts, PageLayout.build(*structure))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weights).sum(), parts)
    given = torch.autograd.grad((found * weights).sum(), parts)
    for own, right in zip(given, wanted, strict=True):
        torch.testing.assert_close(own, right, atol=1e-5, rtol=1e-4)


def test_users_without_pages_and_batches_without_users():
    parts, *structure = make_case(5, most_pages=0)
    expected = reference_page_attention(*parts, *structure)
    torch.testing.assert_close(
        page_attention(*parts, PageLayout.build(*structure)), expected, atol=1e-5, rtol=1e-4
    )
    parts, *structure = make_case(0)
    assert page_attention(*parts, PageLayout.build(*structure)).shape == (0, HEADS, DIM)


@pytest.mark.parametrize("most_pages", [0, 4])
def test_an_accelerators_single_block_gives_the_same(most_pages, monkeypatch):
    from models.kernels import page_attention as kernel
    from models.kernels.length_buckets import padded_layout

    parts, *structure = make_case(7, most_pages=most_pages)
    expected = page_attention(*parts, PageLayout.build(*structure))
    monkeypatch.setattr(kernel, "bucket_layout", padded_layout)
    torch.testing.assert_close(
        page_attention(*parts, PageLayout.build(*structure)), expected, atol=1e-5, rtol=1e-4
    )
