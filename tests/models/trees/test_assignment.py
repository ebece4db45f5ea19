"""Items to children with limited room: the known answer of toys, balance, laziness, and never worse than before."""

import numpy as np
import pytest

from models.trees.assignment import assign_children


def total(gains: np.ndarray, chosen: np.ndarray) -> float:
    return gains[np.arange(len(gains)), chosen].sum()


def test_items_go_where_they_gain_most_and_the_least_loser_moves_on():
    gains = np.array([[5.0, 0, 0], [4, 3, 0], [6, 1, 0], [0, 0, 9]])
    chosen = assign_children(gains, np.zeros(4, dtype=int), np.array([1, 1, 2, 0]), capacity=2)
    assert chosen.tolist() == [0, 1, 0, 2]


def test_equal_gains_leave_items_where_they_are():
    old = np.array([2, 0, 1, 2])
    assert assign_children(np.zeros((4, 3)), np.zeros(4, dtype=int), old, capacity=2).tolist() == old.tolist()
    gains = np.array([[1.0, 0, 1]] * 2)
    assert assign_children(gains, np.zeros(2, dtype=int), np.array([2, 0]), capacity=1).tolist() == [2, 0]


def test_old_places_stay_where_the_greedy_answer_is_worse():
    """Item 0 takes the first child from item 1, which loses more than item 0 gains."""
    gains = np.array([[3.0, 0, -50], [4, 0, -9], [0, 3, -8]])
    parents = np.zeros(3, dtype=int)
    best = assign_children(gains, parents, np.array([-1, -1, -1]), capacity=1)
    old = np.array([2, 0, 1])
    assert total(gains, assign_children(gains, parents, old, capacity=1)) >= max(
        total(gains, old), total(gains, best)
    )


@pytest.mark.parametrize("seed", range(5))
def test_no_child_has_too_many_items_and_no_parent_loses(seed):
    random = np.random.default_rng(seed)
    num_parents, num_children, capacity = 4, 8, 3
    parents = np.repeat(np.arange(num_parents), num_children * capacity - 2)
    gains = -random.exponential(size=(len(parents), num_children)) * random.integers(1, 20, (len(parents), 1))
    places = np.arange(len(parents)) % (num_children * capacity - 2)
    old = places % num_children
    chosen = assign_children(gains, parents, old, capacity)
    assert np.bincount(parents * num_children + chosen).max() <= capacity
    for parent in range(num_parents):
        own = parents == parent
        assert total(gains[own], chosen[own]) >= total(gains[own], old[own])
    # Moved in from elsewhere, so that nothing can be kept.
    old[::3] = -1
    chosen = assign_children(gains, parents, old, capacity)
    assert np.bincount(parents * num_children + chosen).max() <= capacity
