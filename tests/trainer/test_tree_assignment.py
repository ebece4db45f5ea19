"""JTM's re-assignment on a toy whose best tree is known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.errors import ConfigError
from models.semantic_ids import SemanticIds
from models.tdm import TDM
from models.trees.shape import codes_of_order
from tests.generator_cases import TREES
from trainer.tree_assignment import PathSums, Reassigned, assign_levels, path_sums

NUM_ITEMS, DEPTH = 16, 4
WANTED = (5 * torch.arange(NUM_ITEMS) + 3) % NUM_ITEMS // 2
"""The parent of its leaf that each item's users look for: two items each."""


def scorer_over(codes: np.ndarray) -> TDM:
    ids = SemanticIds(codes=torch.from_numpy(codes).long(), code_sizes=(2,) * DEPTH)
    return TREES["tdm"].build(num_items=NUM_ITEMS, semantic_ids=ids)


def reassigned(codes: np.ndarray, levels: int | None) -> Reassigned:
    """One sample for each item, whose users know its ancestors in the best tree by -0.1 and others by -1."""
    model, items = scorer_over(codes), torch.arange(NUM_ITEMS)

    def log_probabilities(depth: int, nodes: Tensor) -> Tensor:
        return torch.where(nodes == (WANTED >> (DEPTH - 1 - depth))[:, None], -0.1, -1.0)

    def summed(places: Tensor, segment: tuple[int, int]) -> PathSums:
        gains, old = path_sums(segment, places, items, model, log_probabilities)
        return PathSums(gains=gains, old=old, counts=torch.ones(NUM_ITEMS))

    return assign_levels(model, summed, levels=levels)


@pytest.mark.parametrize("levels", [1, 2, 3, 7, None])
def test_every_item_finds_its_place_and_then_stays_there(levels):
    first = codes_of_order(np.arange(NUM_ITEMS), 2)
    found = reassigned(first, levels)
    parents = found.codes[:, :-1] @ (2 ** np.arange(DEPTH - 2, -1, -1))
    assert parents.tolist() == WANTED.tolist()
    assert len(np.unique(found.codes, axis=0)) == NUM_ITEMS
    assert found.after == pytest.approx(-0.3) and found.before < found.after
    assert found.num_samples == NUM_ITEMS
    assert found.num_moved == int((WANTED != torch.arange(NUM_ITEMS) // 2).sum())
    again = reassigned(found.codes, levels)
    assert again.num_moved == 0 and again.before == pytest.approx(again.after)
    np.testing.assert_array_equal(again.codes, found.codes)


def test_segments_without_levels_are_refused():
    with pytest.raises(
        ConfigError,
        match="--levels must be at least 1, and is 0; the published number is 7, of a binary tree",
    ):
        reassigned(codes_of_order(np.arange(NUM_ITEMS), 2), 0)


def test_left_to_itself_no_item_chooses_among_more_than_128_places():
    codes = codes_of_order(np.arange(256), 4)
    ids = SemanticIds(codes=torch.from_numpy(codes).long(), code_sizes=(4,) * 4)
    model, segments = TREES["tdm"].build(num_items=256, semantic_ids=ids), []

    def summed(places: Tensor, segment: tuple[int, int]) -> PathSums:
        segments.append(segment)
        gains = torch.zeros(256, 4 ** (segment[1] - segment[0]))
        return PathSums(gains=gains, old=torch.zeros(256), counts=torch.ones(256))

    found = assign_levels(model, summed)
    assert segments == [(0, 3), (3, 4)]
    np.testing.assert_array_equal(found.codes, codes)
