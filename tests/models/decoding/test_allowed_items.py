"""Allow and deny lists against sets."""

import pytest
import torch

from cluster.errors import DataError
from data_streams.jagged import Jagged
from models.decoding.allowed_items import AllowedItems
from models.decoding.space import CatalogueSpace
from models.decoding.trie import PrefixTrie
from tests.models.decoding.tiny_generator import make_codes

SIZES = (3, 4, 3)
NUM_ITEMS = 40
CODES = make_codes(NUM_ITEMS, SIZES, seed=2)
LENGTHS = [5, 0, 30, 12]
ALL = set(range(NUM_ITEMS))


def lists(seed: int, shortest: int = 0) -> Jagged:
    lengths = torch.tensor(LENGTHS).clamp(min=shortest)
    generator = torch.Generator().manual_seed(seed)
    return Jagged.from_lengths(torch.randint(NUM_ITEMS, (int(lengths.sum()),), generator=generator), lengths)


def row(entries: Jagged, user: int) -> set[int]:
    return set(entries.values[entries.offsets[user] : entries.offsets[user + 1]].tolist())


EVERYONE = torch.tensor([1, 4, 4, 7, 9, 12, 13, 21, 22, 23, 24, 25, 30, 31, 32, 33, 38, 39])
CASES = {
    "nothing": ({}, lambda user: ALL),
    "own deny": ({"deny": lists(0)}, lambda user: ALL - row(lists(0), user)),
    "own allow": ({"allow": lists(1, 3)}, lambda user: row(lists(1, 3), user)),
    "both own": (
        {"allow": lists(1, 20), "deny": lists(0)},
        lambda user: row(lists(1, 20), user) - row(lists(0), user),
    ),
    "allow for everyone": ({"allow": EVERYONE}, lambda user: set(EVERYONE.tolist())),
    "deny for everyone": ({"deny": EVERYONE}, lambda user: ALL - set(EVERYONE.tolist())),
    "allow for everyone, own deny": (
        {"allow": EVERYONE, "deny": lists(0)},
        lambda user: set(EVERYONE.tolist()) - row(lists(0), user),
    ),
    "own allow, deny for everyone": (
        {"allow": lists(1, 20), "deny": EVERYONE},
        lambda user: row(lists(1, 20), user) - set(EVERYONE.tolist()),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_allowed_items_are_counted_and_found_below_every_node(case):
    given, expected = CASES[case]
    trie = PrefixTrie.build(CODES, SIZES)
    allowed = AllowedItems.build(trie, num_users=4, **given)
    places = torch.arange(NUM_ITEMS + 1).expand(4, -1)
    before = allowed.before(places)
    for user in range(4):
        is_allowed = [int(item) in expected(user) for item in trie.items]
        assert before[user].tolist() == [sum(is_allowed[:place]) for place in range(NUM_ITEMS + 1)]
        assert allowed.totals()[user] == len(expected(user))
        ranks = torch.arange(len(expected(user))).expand(4, -1)
        found = allowed.select(ranks)[user]
        assert found.tolist() == [place for place in range(NUM_ITEMS) if is_allowed[place]]


@pytest.mark.parametrize("case", CASES)
def test_a_node_is_open_while_an_allowed_item_remains_below_it(case):
    given, expected = CASES[case]
    trie = PrefixTrie.build(CODES, SIZES)
    space = CatalogueSpace(trie, AllowedItems.build(trie, num_users=4, **given))
    paths = [tuple(path) for path in CODES.tolist()]
    for depth in range(len(SIZES)):
        nodes = torch.arange(trie.num_nodes(depth)).expand(4, -1)
        candidates = space.candidates(depth, nodes)
        for user in range(4):
            open_paths = {paths[item][: depth + 1] for item in expected(user)}
            prefixes = trie.paths(depth + 1, candidates.nodes[user][candidates.allowed[user]])
            assert sorted(map(tuple, prefixes.tolist())) == sorted(open_paths)


@pytest.mark.parametrize("lengths", [[0, 30], [0, 0]])
def test_a_user_may_be_left_with_nothing(lengths):
    trie = PrefixTrie.build(CODES, SIZES)
    chosen = Jagged.from_lengths(torch.arange(sum(lengths)), torch.tensor(lengths))
    rest = Jagged.from_lengths(
        torch.arange(NUM_ITEMS).repeat(2), torch.full((2,), NUM_ITEMS)
    )  # which leaves as little as an empty list allows
    for given, totals in (({"allow": chosen}, lengths), ({"deny": rest}, [0, 0])):
        allowed = AllowedItems.build(trie, num_users=2, **given)
        assert allowed.totals().tolist() == totals
        space, root = CatalogueSpace(trie, allowed), torch.zeros(2, 1, dtype=torch.int64)
        assert space.candidates(0, root).allowed.any((1, 2)).tolist() == [total > 0 for total in totals]
        # What fills the row of such a user must be some item all the same.
        leaves = torch.arange(trie.num_nodes(3)).expand(2, -1)
        for items in (
            space.draw_items(leaves, torch.full(leaves.shape, 0.5)),
            trie.items[allowed.select(torch.arange(NUM_ITEMS).expand(2, -1))],
        ):
            assert ((items >= 0) & (items < NUM_ITEMS)).all()


def test_lists_that_leave_nothing_to_everyone_are_refused():
    trie = PrefixTrie.build(CODES, SIZES)
    with pytest.raises(DataError, match="must leave at least one item, and they leave none of 40; shorten"):
        AllowedItems.build(trie, num_users=3, allow=torch.tensor([3]), deny=torch.tensor([3]))


def test_lists_of_another_catalogue_or_batch_are_refused():
    trie = PrefixTrie.build(CODES, SIZES)
    with pytest.raises(DataError, match=r"deny lists must hold item rows 0..39, and they hold 2..40"):
        AllowedItems.build(trie, num_users=4, deny=torch.tensor([2, 40]))
    with pytest.raises(DataError, match="allow lists must be those of the batch's 3 users, and 4 lists"):
        AllowedItems.build(trie, num_users=3, allow=lists(1, 3))
