"""The flat trie against sets of prefixes."""

import pytest
import torch

from cluster.errors import ConfigError, DataError
from models.decoding.trie import PrefixTrie, codes_exist, pack, unpack
from tests.models.decoding.tiny_generator import make_codes
from tests.pretended_device import PRETENDED, PretendedDevice, no_real_device

SIZES = (3, 4, 2, 5)
CODES = make_codes(60, SIZES, seed=1)
PATHS = [tuple(path) for path in CODES.tolist()]


@pytest.fixture(scope="module")
def trie() -> PrefixTrie:
    return PrefixTrie.build(CODES, SIZES)


@pytest.mark.parametrize("depth", range(len(SIZES) + 1))
def test_nodes_are_the_distinct_prefixes_in_order(trie, depth):
    expected = sorted({path[:depth] for path in PATHS})
    assert trie.num_nodes(depth) == len(expected)
    nodes = torch.arange(trie.num_nodes(depth))
    assert [tuple(path) for path in trie.paths(depth, nodes).tolist()] == expected
    assert [unpacked(trie, depth, prefix) for prefix in trie.prefixes[depth]] == expected


def unpacked(trie: PrefixTrie, depth: int, prefix: torch.Tensor) -> tuple[int, ...]:
    return tuple(unpack(prefix, trie.code_sizes[:depth]).tolist())


@pytest.mark.parametrize("depth", range(len(SIZES)))
def test_children_continue_their_node(trie, depth):
    prefixes = sorted({path[:depth] for path in PATHS})
    nodes = torch.arange(len(prefixes))
    children, exists = trie.children(depth, nodes)
    mask = trie.code_mask(depth + 1, children, exists)
    for node, prefix in enumerate(prefixes):
        expected = sorted({path[depth] for path in PATHS if path[:depth] == prefix})
        assert trie.codes(depth + 1, children[node][exists[node]]).tolist() == expected
        assert mask[node].nonzero()[:, 0].tolist() == expected
    assert trie.max_children[depth] == mask.sum(-1).max()


def test_items_below_a_node_lie_side_by_side_and_in_row_order_within_a_path(trie):
    for depth in range(len(SIZES) + 1):
        for node, prefix in enumerate(sorted({path[:depth] for path in PATHS})):
            places = slice(trie.first_place[depth][node], trie.first_place[depth][node + 1])
            below = [item for item in range(60) if PATHS[item][:depth] == prefix]
            assert trie.items[places].tolist() == sorted(below, key=lambda item: (PATHS[item], item))
    assert torch.equal(trie.items[trie.place_of_item.long()], torch.arange(60, dtype=torch.int32))


@pytest.mark.parametrize("depth", range(1, len(SIZES) + 1))
def test_prefixes_are_found_and_others_are_not(trie, depth):
    every = torch.cartesian_prod(*(torch.arange(-1, size + 1) for size in SIZES[:depth])).view(-1, depth)
    known = sorted({path[:depth] for path in PATHS})
    expected = [known.index(path) if path in known else -1 for path in map(tuple, every.tolist())]
    assert trie.find(every).tolist() == expected
    assert max(expected) > 0 and min(expected) == -1


@no_real_device
def test_an_accelerator_is_sent_nothing_to_tell_codes_that_exist():
    paths = torch.tensor([[0, 0, 0, 0], [2, 3, 1, 4], [2, 4, 1, 4], [-1, 0, 0, 0]])
    with PretendedDevice() as device:
        there = paths.to(PRETENDED)
        device.waits.clear()
        found = codes_exist(there, SIZES)
        assert not device.waits
        assert found.cpu().tolist() == [True, True, False, False]


def test_every_item_knows_its_nodes(trie):
    for depth in range(len(SIZES) + 1):
        nodes = trie.item_nodes(depth, torch.arange(60))
        assert torch.equal(trie.paths(depth, nodes), CODES[:, :depth])


def test_packing_keeps_the_order_of_paths_up_to_63_bits():
    sizes = (2**21, 2**21, 2**20)
    paths = torch.tensor([[0, 0, 0], [0, 0, 2**20 - 1], [0, 1, 0], [2**21 - 1, 2**21 - 1, 2**20 - 1]])
    packed = pack(paths, sizes)
    assert (packed.diff() > 0).all()
    assert torch.equal(unpack(packed, sizes), paths)
    assert PrefixTrie.build(paths, sizes).find(paths).tolist() == [0, 1, 2, 3]


def test_codes_of_any_integer_type_give_the_same_trie(trie):
    small = PrefixTrie.build(CODES.to(torch.uint8), SIZES)
    assert all(map(torch.equal, small.prefixes, trie.prefixes))
    assert torch.equal(small.items, trie.items)


def test_a_trie_can_move_to_another_device(trie):
    moved = trie.to(torch.device("cpu"))
    assert moved.memory_bytes() == trie.memory_bytes() > 60 * 8


@pytest.mark.parametrize(
    ("codes", "sizes", "error", "message"),
    [
        (CODES + 1, SIZES, DataError, r"level 0 must lie in 0..2, and they lie in 1..3"),
        (CODES - 1, SIZES, DataError, r"they lie in -1..1"),
        (CODES[:0], SIZES, DataError, r"shape \[0, 4\]"),
        (CODES, SIZES[:3], DataError, r"3 codes\]"),
        (CODES, (2**16,) * 4, ConfigError, "63 bits"),
    ],
)
def test_bad_codes_are_refused(codes, sizes, error, message):
    with pytest.raises(error, match=message):
        PrefixTrie.build(codes, sizes)
