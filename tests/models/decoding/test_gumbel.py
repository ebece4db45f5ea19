"""Draws without replacement against the probabilities of drawing one after another."""

from itertools import permutations

import pytest
import torch

from cluster.errors import ConfigError
from data_streams.jagged import Jagged
from models.decoding.allowed_items import AllowedItems
from models.decoding.distribution import CodeDistribution
from models.decoding.gumbel import GumbelSampling, condition_on_maximum
from models.decoding.space import CatalogueSpace, FreeSpace
from models.decoding.trie import PrefixTrie
from tests.models.decoding.tiny_generator import (
    brute_force,
    logits_one_by_one,
    make_codes,
    make_generator,
    make_users,
    one_user,
)

SIZES = (3, 2, 3)
CODES = torch.tensor([[0, 0, 0], [0, 0, 2], [0, 1, 1], [1, 1, 0], [2, 0, 1], [2, 0, 2]])
NUM_ITEMS = len(CODES)


@pytest.fixture(scope="module")
def world():
    rows, batch = make_users([5], NUM_ITEMS)
    return make_generator(SIZES, NUM_ITEMS), rows, batch, PrefixTrie.build(CODES, SIZES)


def repeated(rows, batch, count: int):
    """The same user many times, so that one search gives many independent draws."""
    users = Jagged.from_lengths(batch.items.values.repeat(count), batch.items.lengths.repeat(count))
    many = type(batch)(user_ids=torch.arange(count), items=users)
    found = rows["history"]
    return {"history": type(found)(ids=users.values, rows=found.rows.repeat(count, 1))}, many


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ordered_draws_have_the_probability_of_drawing_without_putting_back(world, temperature):
    model, rows, batch, trie = world
    count, k = 4_000, 2
    search = GumbelSampling.Config(temperature=temperature).build()
    found = search.search(
        model, *repeated(rows, batch, count), CatalogueSpace(trie), k=k, seeds=torch.arange(count)
    )
    scores = brute_force(
        logits_one_by_one(model, rows, batch, CODES), CODES, CodeDistribution(temperature=temperature)
    )[0]
    probability = scores.exp().double()
    for order in permutations(range(NUM_ITEMS), k):
        expected, left = 1.0, 1.0
        for item in order:
            expected, left = expected * probability[item] / left, left - probability[item]
        drawn = (found.items == torch.tensor(order)).all(1).double().mean()
        assert abs(drawn - expected) < 5 * (expected * (1 - expected) / count) ** 0.5 + 1e-9
    torch.testing.assert_close(found.log_probs, scores[found.items], atol=1e-5, rtol=0)


def test_as_many_draws_as_items_give_every_item_once(world):
    model, rows, batch, trie = world
    found = (
        GumbelSampling.Config()
        .build()
        .search(model, *repeated(rows, batch, 50), CatalogueSpace(trie), k=NUM_ITEMS, seeds=torch.arange(50))
    )
    assert torch.equal(found.items.sort(1).values, torch.arange(NUM_ITEMS).expand(50, -1))
    assert (found.scores.diff(dim=1) <= 0).all()
    assert len(torch.unique(found.items, dim=0)) > 10, "the order is drawn"


def test_perturbed_values_of_the_best_paths_are_gumbel_numbers(world):
    model, rows, batch, trie = world
    count = 4_000
    found = (
        GumbelSampling.Config()
        .build()
        .search(model, *repeated(rows, batch, count), CatalogueSpace(trie), k=1, seeds=torch.arange(count))
    )
    # The largest of all perturbed log-probabilities is a standard Gumbel number, as they sum to one.
    assert abs(found.scores.mean() - 0.57722) < 5 * 1.2825 / count**0.5
    assert abs(found.scores.std() - 1.2825) < 0.05


def test_filters_and_shared_paths_hold_without_replacement():
    sizes = (4, 3, 2)
    codes = make_codes(30, sizes, seed=7)
    trie = PrefixTrie.build(codes, sizes)
    rows, batch = make_users([2, 7, 3], 30)
    model = make_generator(sizes, 30)
    deny = Jagged.from_lengths(torch.arange(27), torch.tensor([12, 0, 15]))
    space = CatalogueSpace(trie, AllowedItems.build(trie, num_users=3, deny=deny))
    search, seeds = GumbelSampling.Config().build(), torch.tensor([5, 6, 7])
    found = search.search(model, rows, batch, space, k=30, seeds=seeds)
    allowed = [set(range(12, 30)), set(range(30)), set(range(30)) - set(range(12, 27))]
    for user in range(3):
        items = [item for item in found.items[user].tolist() if item >= 0]
        assert len(items) == len(set(items)) and set(items) == allowed[user]
        empty = found.items[user] < 0
        assert torch.equal(empty, found.log_probs[user] == float("-inf"))
    forced = model.log_probabilities(
        rows, batch, found.paths, space=space, distribution=search.distribution()
    )
    torch.testing.assert_close(forced.sum(-1), found.log_probs, atol=1e-5, rtol=0)
    for user in range(3):
        rows_of_user, alone = one_user(rows, batch, user)
        own = CatalogueSpace(
            trie,
            AllowedItems.build(
                trie,
                num_users=1,
                deny=Jagged.from_lengths(
                    deny.values[deny.offsets[user] : deny.offsets[user + 1]], deny.lengths[user : user + 1]
                ),
            ),
        )
        again = search.search(model, rows_of_user, alone, own, k=30, seeds=seeds[user : user + 1])
        assert torch.equal(again.items[0], found.items[user])


def test_free_draws_are_different_paths(world):
    model, rows, batch, trie = world
    found = (
        GumbelSampling.Config()
        .build()
        .search(model, rows, batch, FreeSpace(SIZES, trie), k=18, seeds=torch.tensor([1]))
    )
    assert len(torch.unique(found.paths[0], dim=0)) == 18
    assert found.legal.sum() == NUM_ITEMS
    torch.testing.assert_close(found.log_probs.exp().sum(), torch.tensor(1.0))


def test_more_draws_than_items_are_refused(world):
    model, rows, batch, trie = world
    with pytest.raises(ConfigError, match="must not exceed the 6 items"):
        GumbelSampling.Config().build().search(
            model, rows, batch, CatalogueSpace(trie), k=7, seeds=torch.tensor([1])
        )


def test_conditioned_numbers_have_the_given_maximum_and_keep_their_order():
    nothing = float("-inf")
    perturbed = torch.tensor([[1.0, 3.0, 2.0, nothing], [nothing] * 4, [0.0, -40.0, 1e-7, 2e-7]])
    maximum = torch.tensor([[-2.0], [1.0], [50.0]])
    moved = condition_on_maximum(perturbed, maximum)
    assert moved[0, 1] == -2.0 and moved[0, 3] == nothing
    naive = -((-maximum[0]).exp() - (-perturbed[0, 1]).exp() + (-perturbed[0]).exp()).log()
    torch.testing.assert_close(moved[0], naive)
    assert (moved[1] == nothing).all()
    assert moved[2].max() == 50.0 and moved[2].isfinite().all()
    assert (condition_on_maximum(perturbed, torch.full((3, 1), nothing)) == nothing).all()
