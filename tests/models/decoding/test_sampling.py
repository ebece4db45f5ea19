"""Draws with replacement: frequencies, truncation, filters, seeds."""

import pytest
import torch

from cluster.errors import ConfigError
from data_streams.jagged import Jagged
from models.decoding.allowed_items import AllowedItems
from models.decoding.distribution import CodeDistribution
from models.decoding.random_numbers import uniform
from models.decoding.sampling import Sampling
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

SIZES = (3, 4, 2)
NUM_ITEMS = 14
CODES = make_codes(NUM_ITEMS, SIZES, seed=5)
SEEDS = torch.tensor([11, 12, 13])
MANY = 4_000


@pytest.fixture(scope="module")
def world():
    rows, batch = make_users([4, 1, 6], NUM_ITEMS)
    return make_generator(SIZES, NUM_ITEMS), rows, batch, PrefixTrie.build(CODES, SIZES)


def sampling(**options) -> Sampling:
    return Sampling.Config(**options).build()


def within_noise(drawn: torch.Tensor, expected: torch.Tensor, count: int) -> bool:
    """Within five standard deviations of a binomial count, each."""
    deviation = (expected * (1 - expected) / count).sqrt()
    return bool(((drawn - expected).abs() <= 5 * deviation + 1e-9).all())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_items_come_as_often_as_their_probability_says(world, temperature):
    model, rows, batch, trie = world
    found = sampling(temperature=temperature).search(
        model, rows, batch, CatalogueSpace(trie), k=MANY, seeds=SEEDS
    )
    scores = brute_force(
        logits_one_by_one(model, rows, batch, CODES), CODES, CodeDistribution(temperature=temperature)
    )
    sharing = (CODES[:, None] == CODES).all(-1).sum(1)
    assert sharing.max() > 1, "some items share a path and come equally often"
    for user in range(3):
        drawn = found.items[user].bincount(minlength=NUM_ITEMS) / MANY
        assert within_noise(drawn, scores[user].exp() / sharing, MANY)
    torch.testing.assert_close(found.log_probs, scores.gather(1, found.items), atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.8}])
def test_truncated_draws_have_the_probability_of_what_was_left(world, options):
    model, rows, batch, trie = world
    space, search = CatalogueSpace(trie), sampling(temperature=1.3, **options)
    found = search.search(model, rows, batch, space, k=MANY, seeds=SEEDS)
    paths = torch.unique(CODES, dim=0)
    forced = model.log_probabilities(
        rows, batch, paths.expand(3, -1, -1), space=space, distribution=search.distribution()
    ).sum(-1)
    torch.testing.assert_close(forced.exp().sum(1), torch.ones(3))
    assert (forced == float("-inf")).any()
    numbers = trie.find(found.paths)
    for user in range(3):
        drawn = numbers[user].bincount(minlength=len(paths)) / MANY
        assert within_noise(drawn, forced[user].exp(), MANY)
    torch.testing.assert_close(forced.gather(1, numbers), found.log_probs, atol=1e-5, rtol=0)


def test_forbidden_items_are_never_drawn_and_the_rest_sums_to_one(world):
    model, rows, batch, trie = world
    deny = Jagged.from_lengths(
        torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]), torch.tensor([4, 0, 9])
    )
    space = CatalogueSpace(trie, AllowedItems.build(trie, num_users=3, deny=deny))
    search = sampling()
    found = search.search(model, rows, batch, space, k=2000, seeds=SEEDS)
    assert set(found.items[0].tolist()).isdisjoint({0, 1, 2, 3})
    assert set(found.items[2].tolist()).isdisjoint(set(range(4, 13)))
    every = torch.unique(CODES, dim=0).expand(3, -1, -1)
    forced = model.log_probabilities(rows, batch, every, space=space, distribution=search.distribution())
    torch.testing.assert_close(forced.sum(-1).exp().sum(1), torch.ones(3))
    again = model.log_probabilities(rows, batch, found.paths, space=space, distribution=search.distribution())
    torch.testing.assert_close(again.sum(-1), found.log_probs, atol=1e-5, rtol=0)


def test_free_draws_follow_the_bare_model(world):
    model, rows, batch, trie = world
    found = sampling().search(model, rows, batch, FreeSpace(SIZES, trie), k=MANY, seeds=SEEDS)
    every = torch.cartesian_prod(*map(torch.arange, SIZES))
    expected = model.log_probabilities(rows, batch, every.expand(3, -1, -1)).sum(-1).exp()
    is_item = trie.find(every) >= 0
    for user in range(3):
        drawn = FreeSpace(SIZES).find(found.paths[user]).bincount(minlength=24) / MANY
        assert within_noise(drawn, expected[user], MANY)
    rate = 1 - expected[:, is_item].sum(1).mean()
    assert abs(found.hallucination_rate() - rate) < 0.03


def test_a_users_draws_depend_on_the_seed_alone(world):
    model, rows, batch, trie = world
    space = CatalogueSpace(trie)
    together = sampling().search(model, rows, batch, space, k=50, seeds=SEEDS)
    for user in range(3):
        rows_of_user, alone = one_user(rows, batch, user)
        found = sampling().search(model, rows_of_user, alone, space, k=50, seeds=SEEDS[user : user + 1])
        assert torch.equal(found.items[0], together.items[user])
        torch.testing.assert_close(found.log_probs[0], together.log_probs[user], atol=1e-5, rtol=0)
    other = sampling().search(model, rows, batch, space, k=50, seeds=SEEDS + 1)
    assert not torch.equal(other.items, together.items)


def test_random_numbers_are_even_and_independent_of_neighbouring_seeds():
    numbers = uniform(torch.arange(300)[:, None], 1, torch.arange(400))
    assert 0 < numbers.min() and numbers.max() < 1
    counts = (numbers * 20).long().flatten().bincount(minlength=20) / numbers.numel()
    assert (counts - 0.05).abs().max() < 5 * (0.05 * 0.95 / numbers.numel()) ** 0.5
    for shifted in (numbers[1:, :] * numbers[:-1, :], numbers[:, 1:] * numbers[:, :-1]):
        assert abs(shifted.mean() - 0.25) < 0.005
    assert abs((numbers * uniform(torch.arange(300)[:, None], 2, torch.arange(400))).mean() - 0.25) < 0.005


def test_drawing_needs_a_seed_for_every_user(world):
    model, rows, batch, trie = world
    for seeds in (None, SEEDS[:2], SEEDS.float()):
        with pytest.raises(ConfigError, match="one int64 seed for each of the 3 users"):
            sampling().search(model, rows, batch, CatalogueSpace(trie), k=2, seeds=seeds)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 0}])
def test_impossible_distributions_are_refused(options):
    with pytest.raises(ConfigError, match="temperature above 0"):
        sampling(**options)


def test_truncation_of_the_model_s_own_probability_is_refused():
    with pytest.raises(ConfigError, match="over = allowed"):
        CodeDistribution(top_k=3, over="all")
