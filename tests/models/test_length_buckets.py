"""Users in buckets by length, and in the one padded block of an accelerator."""

import pytest
import torch

from data_streams.jagged import Jagged
from models.kernels.length_buckets import bucket_layout, padded_layout, to_cells, to_tokens


@pytest.mark.parametrize("layout_of", [bucket_layout, padded_layout])
def test_users_without_any_token_have_cells_of_zeros_and_give_no_token_back(layout_of):
    tokens = torch.zeros(0, 2, 3, requires_grad=True)
    layout = layout_of(Jagged.from_lengths(torch.zeros(0), torch.tensor([0, 0])))
    cells = list(to_cells(tokens, layout))
    assert [tuple(part.shape) for part in cells] == [(*bucket, 2, 3) for bucket in layout.buckets]
    assert all((part == 0).all() for part in cells)
    if cells:
        found = to_tokens(cells, layout)
        assert found.shape == tokens.shape
        found.sum().backward()
        assert tokens.grad.shape == tokens.shape
