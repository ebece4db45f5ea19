"""Beam search against scoring every item by itself."""

import pytest
import torch

from cluster.errors import ConfigError
from data_streams.jagged import Jagged
from models.decoding.allowed_items import AllowedItems
from models.decoding.beam_search import BeamSearch
from models.decoding.distribution import CodeDistribution
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

SIZES = (4, 5, 3)
NUM_ITEMS = 50
LENGTHS = [3, 9, 1, 9, 4, 2]


@pytest.fixture(scope="module")
def world():
    codes = make_codes(NUM_ITEMS, SIZES)
    rows, batch = make_users(LENGTHS, NUM_ITEMS)
    return make_generator(SIZES, NUM_ITEMS), rows, batch, codes, PrefixTrie.build(codes, SIZES)


@pytest.fixture(scope="module")
def logits(world):
    model, rows, batch, codes, _ = world
    return logits_one_by_one(model, rows, batch, codes)


def beam(width: int, **options) -> BeamSearch:
    return BeamSearch.Config(width=width, **options).build()


def ranked(scores: torch.Tensor, codes: torch.Tensor, user: int, allowed=None) -> list[int]:
    """Items by descending score; items of one path in the order of their rows."""
    paths = codes.tolist()
    best_of_path = {}
    for item, path in enumerate(paths):
        best_of_path.setdefault(tuple(path), scores[user, item].item())
    items = range(len(paths)) if allowed is None else sorted(allowed)
    return sorted(items, key=lambda item: (-best_of_path[tuple(paths[item])], paths[item], item))


@pytest.mark.parametrize("over", ["all", "allowed"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_beam_as_wide_as_the_catalogue_is_the_brute_force_ranking(world, logits, over, temperature):
    model, rows, batch, codes, trie = world
    search = beam(NUM_ITEMS, over=over, temperature=temperature)
    found = search.search(model, rows, batch, CatalogueSpace(trie), k=NUM_ITEMS)
    scores = brute_force(logits, codes, CodeDistribution(temperature=temperature, over=over))
    for user in range(batch.num_users):
        assert found.items[user].tolist() == ranked(scores, codes, user)
    torch.testing.assert_close(found.log_probs, scores.gather(1, found.items), atol=1e-5, rtol=0)
    assert torch.equal(found.paths, codes[found.items])
    assert len(torch.unique(codes, dim=0)) < NUM_ITEMS, "some items of this catalogue share their path"


def test_a_narrow_beam_keeps_the_best_prefixes_of_every_depth(world):
    model, rows, batch, codes, trie = world
    width, distribution = 3, CodeDistribution(over="all")
    found = beam(width).search(model, rows, batch, CatalogueSpace(trie), k=width)
    paths = torch.unique(codes, dim=0)
    for user in range(batch.num_users):
        rows_of_user, alone = one_user(rows, batch, user)
        of_codes = model.log_probabilities(rows_of_user, alone, paths[None], distribution=distribution)[0]
        kept = {()}
        for depth in range(1, len(SIZES) + 1):
            totals = {
                tuple(path[:depth].tolist()): of_codes[number, :depth].sum().item()
                for number, path in enumerate(paths)
                if tuple(path[: depth - 1].tolist()) in kept
            }
            kept = set(sorted(totals, key=totals.get, reverse=True)[:width])
        best_path = max(kept, key=totals.get)
        assert tuple(found.paths[user, 0].tolist()) == best_path
        assert {tuple(path) for path in found.paths[user].tolist()} <= kept


@pytest.mark.parametrize("over", ["all", "allowed"])
def test_log_probabilities_equal_those_of_teacher_forcing_under_mask_and_temperature(world, over):
    model, rows, batch, _, trie = world
    search = beam(20, over=over, temperature=0.7)
    deny = Jagged.from_lengths(torch.arange(24), torch.full((6,), 4))
    space = CatalogueSpace(trie, AllowedItems.build(trie, num_users=6, deny=deny))
    found = search.search(model, rows, batch, space, k=20)
    forced = model.log_probabilities(
        rows, batch, found.paths, space=space, distribution=search.distribution()
    )
    assert found.filled.all()
    torch.testing.assert_close(forced.sum(-1), found.log_probs, atol=1e-5, rtol=0)


def test_filters_act_inside_the_search(world, logits):
    model, rows, batch, codes, trie = world
    generator = torch.Generator().manual_seed(3)
    deny = Jagged.from_lengths(
        torch.randint(NUM_ITEMS, (180,), generator=generator), torch.tensor([0, 60, 5, 40, 70, 5])
    )
    allow = torch.randperm(NUM_ITEMS, generator=generator)[:35]
    space = CatalogueSpace(trie, AllowedItems.build(trie, num_users=6, allow=allow, deny=deny))
    found = beam(NUM_ITEMS).search(model, rows, batch, space, k=NUM_ITEMS)
    scores = brute_force(logits, codes, CodeDistribution(over="all"))
    for user in range(batch.num_users):
        denied = deny.values[deny.offsets[user] : deny.offsets[user + 1]].tolist()
        expected = ranked(scores, codes, user, set(allow.tolist()) - set(denied))
        count = len(expected)
        assert 0 < count < NUM_ITEMS
        assert found.items[user, :count].tolist() == expected
        assert (found.items[user, count:] == -1).all(), "short results are no padding items"
        assert (found.log_probs[user, count:] == float("-inf")).all()
        assert (found.paths[user, count:] == -1).all()
        assert (found.log_probs[user, :count] > float("-inf")).all()


def test_a_batch_gives_what_its_users_give_alone(world):
    model, rows, batch, _, trie = world
    space = CatalogueSpace(trie)
    together = beam(8).search(model, rows, batch, space, k=5)
    for user in range(batch.num_users):
        alone = beam(8).search(model, *one_user(rows, batch, user), space, k=5)
        assert torch.equal(alone.items[0], together.items[user])
        torch.testing.assert_close(alone.log_probs[0], together.log_probs[user], atol=1e-5, rtol=0)


def test_equal_scores_go_to_the_smaller_path_and_item(world):
    _, rows, batch, codes, trie = world
    uniform = make_generator(SIZES, NUM_ITEMS)
    for head in uniform.heads:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    found = beam(NUM_ITEMS).search(uniform, rows, batch, CatalogueSpace(trie), k=NUM_ITEMS)
    expected = sorted(range(NUM_ITEMS), key=lambda item: (codes[item].tolist(), item))
    assert found.items.tolist() == [expected] * batch.num_users


def test_equal_scores_go_to_the_smaller_path_also_where_its_beginning_is_less_likely():
    codes = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    model, (rows, batch) = make_generator((2, 2), 4), make_users(LENGTHS, 4)
    for head, scores in zip(model.heads, ([0.0, 1.0], [1.0, 0.0]), strict=True):
        torch.nn.init.zeros_(head.weight)
        head.bias.data = torch.tensor(scores)
    found = beam(4).search(model, rows, batch, CatalogueSpace(PrefixTrie.build(codes, (2, 2))), k=4)
    assert (found.scores[:, 1] == found.scores[:, 2]).all()
    assert found.items.tolist() == [[2, 0, 3, 1]] * batch.num_users


def test_a_free_search_reports_how_many_paths_belong_to_no_item(world):
    model, rows, batch, codes, trie = world
    catalogue = {tuple(path) for path in codes.tolist()}
    found = beam(30).search(model, rows, batch, FreeSpace(SIZES, trie), k=30)
    legal = [[tuple(path) in catalogue for path in user] for user in found.paths.tolist()]
    assert found.legal.tolist() == legal
    illegal = sum(not path for user in legal for path in user)
    assert 0 < illegal < 180
    assert found.hallucination_rate().item() == pytest.approx(illegal / 180)
    assert (found.log_probs > float("-inf")).all() and (found.items[~found.legal] == -1).all()
    forced = model.log_probabilities(rows, batch, found.paths)
    torch.testing.assert_close(forced.sum(-1), found.log_probs, atol=1e-5, rtol=0)


def test_existing_items_of_a_free_search_move_up(world):
    model, rows, batch, _, trie = world
    found = beam(30).search(model, rows, batch, FreeSpace(SIZES, trie), k=30)
    items, scores = found.existing()
    for user in range(batch.num_users):
        legal = found.items[user][found.legal[user]].tolist()
        assert items[user].tolist() == legal + [-1] * (30 - len(legal))
        assert (scores[user].diff()[: len(legal) - 1] <= 0).all()
        assert (scores[user, len(legal) :] == float("-inf")).all()


def test_a_free_search_over_all_paths_sums_to_one(world):
    model, rows, batch, _, trie = world
    found = beam(60).search(model, rows, batch, FreeSpace(SIZES, trie), k=60)
    torch.testing.assert_close(found.log_probs.exp().sum(1), torch.ones(6))


def naive_free_beam(model, rows, batch, codes, user: int, allowed: set[int], width: int):
    """Paths and items a beam over all paths keeps, where items not allowed are forbidden; by loops."""
    items_of = {}
    for item, path in enumerate(codes.tolist()):
        items_of.setdefault(tuple(path), []).append(item)
    every = [tuple(path) for path in torch.cartesian_prod(*map(torch.arange, SIZES)).tolist()]
    own = {path: [item for item in items_of.get(path, ()) if item in allowed] for path in every}
    is_open = [path for path in every if own[path] or path not in items_of]
    rows_of_user, alone = one_user(rows, batch, user)
    of_codes = model.log_probabilities(rows_of_user, alone, torch.tensor(every)[None])[0]
    totals = {(): 0.0}
    for depth in range(1, len(SIZES) + 1):
        longer = {
            path[:depth]: of_codes[every.index(path), :depth].sum().item()
            for path in is_open
            if path[: depth - 1] in totals
        }
        totals = dict(sorted(longer.items(), key=lambda entry: -entry[1])[:width])
    return list(totals), [own[path][0] if own[path] else -1 for path in totals]


@pytest.mark.parametrize("width", [60, 9, 3])
def test_filters_act_inside_a_free_search(world, width):
    model, rows, batch, codes, trie = world
    generator = torch.Generator().manual_seed(3)
    deny = Jagged.from_lengths(
        torch.randint(NUM_ITEMS, (100,), generator=generator), torch.tensor([0, 40, 5, 40, 10, 5])
    )
    # All but a few items are forbidden, so that some prefixes lead to nothing but these.
    allow = torch.randperm(NUM_ITEMS, generator=generator)[:12]
    space = FreeSpace(SIZES, trie, AllowedItems.build(trie, num_users=6, allow=allow, deny=deny))
    found = beam(width).search(model, rows, batch, space, k=width)
    forced = model.log_probabilities(
        rows, batch, found.paths, space=space, distribution=beam(1).distribution()
    )
    torch.testing.assert_close(forced.sum(-1), found.log_probs, atol=1e-5, rtol=0)
    for user in range(batch.num_users):
        denied = deny.values[deny.offsets[user] : deny.offsets[user + 1]].tolist()
        allowed = set(allow.tolist()) - set(denied)
        paths, items = naive_free_beam(model, rows, batch, codes, user, allowed, width)
        count = len(paths)
        assert count < 60 if width == 60 else count == width, "a narrow beam is full whatever is forbidden"
        assert [tuple(path) for path in found.paths[user, :count].tolist()] == paths
        assert found.items[user].tolist() == items + [-1] * (width - count)
        assert (found.log_probs[user, count:] == float("-inf")).all()
    assert found.legal.any() and not found.legal.all()


def test_a_free_search_never_enters_a_prefix_of_forbidden_items_alone():
    sizes = (2, 3)
    codes = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 1]])
    trie, model = PrefixTrie.build(codes, sizes), make_generator(sizes, 4)
    rows, batch = make_users([2, 3], 4)
    deny = Jagged.from_lengths(torch.tensor([0, 1, 2, 3]), torch.tensor([3, 1]))
    space = FreeSpace(sizes, trie, AllowedItems.build(trie, num_users=2, deny=deny))
    found = beam(6).search(model, rows, batch, space, k=6)
    paths = [{tuple(path) for path in user if path[0] >= 0} for user in found.paths.tolist()]
    assert paths == [{(1, 0), (1, 1), (1, 2)}, {(0, 0), (0, 1), (0, 2), (1, 0), (1, 2)}]
    assert found.kept[0].tolist()[0].count(-1) == 1 and -1 not in found.kept[0].tolist()[1]
    narrow = beam(1).search(model, rows, batch, space, k=1)
    assert narrow.filled.all() and narrow.paths[0, 0, 0] == 1


def test_a_guide_with_no_choice_changes_only_the_order(world):
    model, rows, batch, codes, _ = world
    space = CatalogueSpace(PrefixTrie.build(torch.unique(codes, dim=0), SIZES))
    guided = BeamSearch(
        BeamSearch.Config(width=6, guided_candidates=6), lambda depth, prefixes: -prefixes[..., -1].float()
    )
    plain = beam(6).search(model, rows, batch, space, k=6)
    found = guided.search(model, rows, batch, space, k=6)
    assert torch.equal(found.items.sort(1).values, plain.items.sort(1).values)
    assert torch.equal(found.scores, -found.paths[..., -1].float())
    assert (found.scores.diff(dim=1) <= 0).all()


def test_a_beam_of_another_width_at_each_depth_is_that_of_steps_by_hand(world):
    model, rows, batch, _, trie = world
    space = CatalogueSpace(trie)
    found = BeamSearch(BeamSearch.Config(width=6, earlier_widths=(2, 3))).search(
        model, rows, batch, space, k=6
    )
    assert [nodes.shape[1] for nodes in found.kept] == [2, 3, 6]
    wide = beam(NUM_ITEMS).search(model, rows, batch, space, k=NUM_ITEMS)
    for user in range(6):
        firsts = wide.kept[0][user, :2]
        assert torch.equal(found.kept[0][user], firsts)
        of_firsts = space.codes(2, wide.kept[1][user])[:, 0]
        seconds = wide.kept[1][user][torch.isin(of_firsts, space.codes(1, firsts)[:, 0])]
        assert torch.equal(found.kept[1][user], seconds[:3])


def test_a_guide_has_candidates_of_each_depth_beside_the_width_there(world):
    model, rows, batch, _, trie = world
    asked = []

    def guide(depth: int, prefixes: torch.Tensor) -> torch.Tensor:
        asked.append(prefixes.shape[1])
        return -prefixes[..., -1].float()

    config = BeamSearch.Config(width=4, earlier_widths=(2, 3), guided_candidates=(3, 7, 5))
    found = BeamSearch(config, guide).search(model, rows, batch, CatalogueSpace(trie), k=4)
    assert asked == [3, 7, 5] and [nodes.shape[1] for nodes in found.kept] == [2, 3, 4]
    BeamSearch(BeamSearch.Config(width=4, earlier_widths=(2,)), guide).search(
        model, rows, batch, CatalogueSpace(trie), k=4
    )
    assert asked[3] == 4 and len(asked) == 6, "four times the width of the depth, of four codes"


def test_a_guide_alone_chooses_among_the_candidates(world):
    model, rows, batch, codes, trie = world
    target = codes[17]

    def guide(depth: int, prefixes: torch.Tensor) -> torch.Tensor:
        return (prefixes == target[:depth]).all(-1).float()

    search = BeamSearch(BeamSearch.Config(width=1, guided_candidates=NUM_ITEMS), guide)
    found = search.search(model, rows, batch, CatalogueSpace(trie), k=1)
    assert (found.paths == target).all()
    forced = model.log_probabilities(
        rows, batch, found.paths, space=CatalogueSpace(trie), distribution=search.distribution()
    )
    torch.testing.assert_close(forced.sum(-1), found.log_probs, atol=1e-5, rtol=0)


def test_a_guide_that_knows_the_target_finds_it_more_often_the_more_candidates_it_is_asked_about(world):
    model, rows, batch, codes, trie = world
    space, targets = CatalogueSpace(trie), codes[torch.arange(6) * 7 + 3]

    def guide(depth: int, prefixes: torch.Tensor) -> torch.Tensor:
        return (prefixes == targets[:, None, :depth]).all(-1).float()

    shares = []
    for candidates in (1, 2, 3, 5, 12, NUM_ITEMS):
        config = BeamSearch.Config(width=1, guided_candidates=candidates)
        found = BeamSearch(config, guide).search(model, rows, batch, space, k=1)
        kept = [space.codes(depth, nodes[:, 0]) for depth, nodes in enumerate(found.kept, start=1)]
        shares.append([(own == targets[:, : own.shape[1]]).all(1).float().mean() for own in kept])
    # HRecall of each depth by growing K+: it begins at that of the plain beam, and ends where nothing is missed.
    by_candidates = torch.tensor(shares)
    assert (by_candidates.diff(dim=0) >= 0).all() and (by_candidates[0] < 1).all()
    assert (by_candidates[-1] == 1).all() and (by_candidates[1:-1, -1] % 1 > 0).any()


def test_a_guide_to_whom_all_are_alike_keeps_the_most_likely_in_their_order(world):
    model, rows, batch, _, trie = world
    config = BeamSearch.Config(width=6, guided_candidates=24)
    search = BeamSearch(config, lambda depth, prefixes: torch.zeros(prefixes.shape[:2]))
    found = search.search(model, rows, batch, CatalogueSpace(trie), k=6)
    plain = beam(6).search(model, rows, batch, CatalogueSpace(trie), k=6)
    assert torch.equal(found.items, plain.items) and torch.equal(found.log_probs, plain.log_probs)


def test_widths_that_cannot_work_are_refused(world):
    model, rows, batch, codes, trie = world
    space = CatalogueSpace(trie)
    with pytest.raises(ConfigError, match="must not exceed the 50 items"):
        beam(51).search(model, rows, batch, space, k=5)
    with pytest.raises(ConfigError, match="cannot return 9 items"):
        beam(8).search(model, rows, batch, space, k=9)
    with pytest.raises(ConfigError, match="at least one item"):
        beam(8).search(model, rows, batch, space, k=0)
    with pytest.raises(ConfigError, match="at least 1 wide"):
        beam(0)
    with pytest.raises(ConfigError, match="at least 1 wide"):
        BeamSearch(BeamSearch.Config(width=8, earlier_widths=(0,)))
    with pytest.raises(ConfigError, match="12 are fewer than 20"):
        config = BeamSearch.Config(width=8, earlier_widths=(9, 20), guided_candidates=12)
        BeamSearch(config, lambda depth, prefixes: prefixes[..., 0])
    with pytest.raises(ConfigError, match="4 are fewer than 8"):
        BeamSearch(BeamSearch.Config(width=8, guided_candidates=4), lambda depth, prefixes: prefixes[..., 0])
    other = PrefixTrie.build(codes, (4, 5, 4))
    with pytest.raises(ConfigError, match="code sizes of the catalogue"):
        beam(8).search(model, rows, batch, CatalogueSpace(other), k=5)
    allowed = AllowedItems.build(
        trie, num_users=2, deny=Jagged.from_lengths(torch.arange(2), torch.ones(2).long())
    )
    with pytest.raises(ConfigError, match="users"):
        beam(8).search(model, rows, batch, CatalogueSpace(trie, allowed), k=5)
