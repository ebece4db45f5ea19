"""The mask of a prefix language model against attention written out token by token, and what it hides bit by bit."""

import pytest
import torch

from data_streams.jagged import Jagged
from models.kernels.region_attention import RegionLayout, reference_region_attention, region_attention

HEADS, DIM = 2, 4


def make_case(seed=0):
    """Three regions of which one has no prompt, prompts of unequal length that know different parts."""
    lengths, num_prompts = torch.tensor([5, 1, 40]), torch.tensor([3, 0, 2])
    regions = Jagged.from_lengths(torch.zeros(46), lengths)
    prompts = Jagged.from_lengths(torch.zeros(12), torch.tensor([1, 4, 2, 3, 2]))
    visible = Jagged.from_lengths(torch.tensor([5, 2, 5, 40, 33]), num_prompts)
    # Segments of two tokens: each sees up to its own end.
    limits = torch.minimum(regions.places() // 2 * 2 + 2, lengths[regions.row_index()])
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(3, 58, HEADS, DIM, generator=generator)
    return parts, regions, limits, prompts, visible


@pytest.mark.parametrize("is_bidirectional", [True, False])
def test_packed_attention_equals_attention_token_by_token(is_bidirectional):
    parts, regions, limits, prompts, visible = make_case()
    if is_bidirectional:
        limits = regions.lengths[regions.row_index()]
    parts.requires_grad_()
    found = region_attention(*parts, RegionLayout.build(regions, limits, prompts, visible))
    expected = reference_region_attention(*parts, regions, limits, prompts, visible)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (ours,), (theirs,) = (torch.autograd.grad((out * weights).sum(), parts) for out in (found, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_what_is_hidden_changes_no_bit():
    parts, regions, limits, prompts, visible = make_case()
    layout = RegionLayout.build(regions, limits, prompts, visible)
    before, num_region = region_attention(*parts, layout), len(regions.values)
    for token in (0, 4, 5, 6, 41, num_region, num_region + 2, num_region + 10):
        changed = parts.clone()
        changed[:, token] = 7.0
        differs = (region_attention(*changed, layout) != before).flatten(1).any(1)
        assert differs.tolist() == sees(token, regions, limits, prompts, visible)


def sees(token, regions, limits, prompts, visible) -> list[bool]:
    """Which tokens see a token, itself among them, by the definition of the mask."""
    found = []
    for place, row, limit in zip(regions.places(), regions.row_index(), limits, strict=True):
        first = int(regions.offsets[row])
        found.append(first <= token < first + int(limit) or token == first + int(place))
    for number, row in enumerate(prompts.row_index().tolist()):
        first = int(regions.offsets[visible.row_index()[row]])
        in_region = first <= token < first + int(visible.values[row])
        own = len(regions.values) + int(prompts.offsets[row])
        found.append(in_region or own <= token <= len(regions.values) + number)
    return found
