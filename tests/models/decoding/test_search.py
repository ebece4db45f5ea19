"""What holds for every search in the folder, with its default options."""

import pytest
import torch

from cluster.plugins import plugin_config, plugin_files
from data_streams.jagged import Jagged
from models.decoding.allowed_items import AllowedItems
from models.decoding.space import CatalogueSpace, FreeSpace
from models.decoding.trie import PrefixTrie
from tests.models.decoding.tiny_generator import make_codes, make_generator, make_users

SIZES = (5, 6, 4)
NUM_ITEMS = 70
SEARCHES = [
    name for name, path in plugin_files("models.decoding").items() if "class Config" in path.read_text()
]


@pytest.fixture(scope="module")
def world():
    rows, batch = make_users([2, 9, 4], NUM_ITEMS)
    trie = PrefixTrie.build(make_codes(NUM_ITEMS, SIZES), SIZES)
    deny = Jagged.from_lengths(torch.arange(60), torch.tensor([20, 5, 35]))
    space = CatalogueSpace(trie, AllowedItems.build(trie, num_users=3, deny=deny))
    return make_generator(SIZES, NUM_ITEMS), rows, batch, space, deny


def test_the_searches_are_found():
    assert {"beam-search", "sampling", "gumbel"} <= set(SEARCHES)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_gives_allowed_items_with_the_probability_of_their_paths(world, name):
    model, rows, batch, space, deny = world
    search = plugin_config("models.decoding", name)().build()
    found = search.search(model, rows, batch, space, k=10, seeds=torch.arange(3))
    assert found.items.shape == found.log_probs.shape == found.scores.shape == (3, 10)
    assert found.log_probs.dtype == found.scores.dtype == torch.float32
    assert found.legal.all() and found.hallucination_rate() == 0
    for user in range(3):
        denied = deny.values[deny.offsets[user] : deny.offsets[user + 1]]
        assert not torch.isin(found.items[user], denied).any()
    assert torch.equal(space.trie.find(found.paths), space.trie.item_nodes(3, found.items))
    forced = model.log_probabilities(
        rows, batch, found.paths, space=space, distribution=search.distribution()
    )
    torch.testing.assert_close(forced.sum(-1), found.log_probs, atol=1e-5, rtol=0)
    torch.testing.assert_close(forced, found.code_log_probs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_free_search_gives_no_forbidden_items(world, name):
    model, rows, batch, space, deny = world
    free = FreeSpace(SIZES, space.trie, space.allowed)
    search = plugin_config("models.decoding", name)().build()
    found = search.search(model, rows, batch, free, k=50, seeds=torch.arange(3))
    assert found.filled.all() and not found.legal.all() and (found.log_probs > float("-inf")).all()
    for user in range(3):
        denied = deny.values[deny.offsets[user] : deny.offsets[user + 1]]
        assert not torch.isin(found.items[user], denied).any()
    forced = model.log_probabilities(rows, batch, found.paths, space=free, distribution=search.distribution())
    torch.testing.assert_close(forced.sum(-1), found.log_probs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_user_to_whom_nothing_is_left_gets_empty_slots_and_others_what_they_get_alone(world, name):
    model, rows, batch, space, _ = world
    search, lengths = plugin_config("models.decoding", name)().build(), torch.tensor([20, NUM_ITEMS, 35])
    denied = torch.cat([torch.arange(count) for count in lengths])
    deny = Jagged.from_lengths(denied, lengths)
    kinder = Jagged.from_lengths(torch.cat((denied[:20], denied[-35:])), torch.tensor([20, 0, 35]))
    found, other = (
        search.search(
            model,
            rows,
            batch,
            CatalogueSpace(space.trie, AllowedItems.build(space.trie, num_users=3, deny=lists)),
            k=10,
            seeds=torch.arange(3),
        )
        for lists in (deny, kinder)
    )
    assert (found.items[1] == -1).all() and (found.paths[1] == -1).all()
    assert (found.scores[1] == float("-inf")).all() and (found.log_probs[1] == float("-inf")).all()
    assert torch.equal(found.items[::2], other.items[::2]) and other.legal.all()
    assert torch.equal(found.log_probs[::2], other.log_probs[::2])
    assert (found.hallucination_rates() == 0).all()


@pytest.mark.parametrize("name", SEARCHES)
def test_a_batch_without_users_gives_nothing(world, name):
    model, _, _, space, _ = world
    rows, batch = make_users([], NUM_ITEMS)
    seeds = torch.zeros(0, dtype=torch.int64)
    search = plugin_config("models.decoding", name)().build()
    for each in (CatalogueSpace(space.trie), FreeSpace(SIZES, space.trie)):
        found = search.search(model, rows, batch, each, k=10, seeds=seeds)
        assert found.items.shape == (0, 10) and found.paths.shape == (0, 10, 3)
    forced = model.log_probabilities(rows, batch, found.paths)
    assert forced.shape == (0, 10, 3)
    forced.sum().backward()
    assert all(block.query_key_value.weight.grad is not None for block in model.blocks)
