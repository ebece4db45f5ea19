"""Users apart by how often their held-out item was trained on."""

import numpy as np
import pytest
from rich.console import Console

from trainer.slices import by_training_events, render_slices, slice_rows

COUNTS = np.array([0, 1, 5, 6, 20, 21, 1000, 0])
RECALL = np.array([1, 0, 1, 0, 0, 1, 1, 0], dtype=float)


def test_each_user_is_in_the_slice_of_the_held_out_item():
    slices = by_training_events(COUNTS, {"recall@10": RECALL})
    assert slices == {
        "0": {"num_users": 2, "recall@10": 0.5},
        "1 to 5": {"num_users": 2, "recall@10": 0.5},
        "6 to 20": {"num_users": 2, "recall@10": 0.0},
        "more than 20": {"num_users": 2, "recall@10": 1.0},
    }
    whole = sum(means["num_users"] * means["recall@10"] for means in slices.values()) / len(COUNTS)
    assert whole == pytest.approx(RECALL.mean())


def test_a_slice_without_users_is_left_out():
    slices = by_training_events(COUNTS[1:3], {"recall@10": RECALL[1:3]})
    assert [*slices] == ["1 to 5"] and slice_rows(slices) == [["num_users", "2"], ["recall@10", "0.5000"]]
    console = Console(record=True, width=80, quiet=True)
    console.print(render_slices(slices))
    assert by_training_events(COUNTS[:0], {"recall@10": RECALL[:0]}) == {}
