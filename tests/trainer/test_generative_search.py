"""Generative search as evaluation and `grail recommend` use it: against brute force, with lists, and refusals."""

from dataclasses import replace

import polars as pl
import pytest
import torch

from cluster.errors import ConfigError, DataError
from data_streams.item_table import ItemTable
from tests.generator_cases import NUM_ITEMS, make_generator, semantic_ids, unsharded_lookup
from tests.trainer.test_evaluate import make_batch as make_users
from tests.trainer.test_evaluate import make_items, make_search
from tests.training_cases import make_batch
from trainer.configuration import SearchConfig
from trainer.generative_search import GenerativeSearch
from trainer.item_lists import allowed_rows

CPU = torch.device("cpu")
EVERYTHING = SearchConfig(width=NUM_ITEMS)


def search_of(config: SearchConfig = EVERYTHING, allowed: torch.Tensor | None = None) -> GenerativeSearch:
    model = make_generator("tiger").eval()
    return GenerativeSearch.build(
        model, unsharded_lookup(model), semantic_ids().codes, config=config, device=CPU, allowed=allowed
    )


def users():
    """Four users, who have seen what their histories hold; the first has seen the held-out item too."""
    generator = torch.Generator().manual_seed(3)
    batch = make_batch([torch.randint(NUM_ITEMS, (length,), generator=generator) for length in (5, 9, 3, 2)])
    held_out = torch.tensor([int(batch.items.values[0]), 4, 50, 90])
    return replace(batch, held_out=held_out, seen=batch.items)


def test_ranks_and_lists_are_those_of_all_scores():
    search, batch = search_of(), users()
    every_item = torch.arange(NUM_ITEMS).expand(batch.num_users, -1)
    scores = search.score(batch, every_item)
    found = search.find(batch, k=NUM_ITEMS, rank_held_out=True, filter_seen=False)
    torch.testing.assert_close(found.scores, scores.sort(dim=1, descending=True).values, atol=1e-4, rtol=0)
    own = scores.gather(1, batch.held_out[:, None])
    expected = 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    assert torch.equal(found.ranks, expected)
    assert all(found.measures[f"hrecall{depth}@{NUM_ITEMS}"].eq(1).all() for depth in (1, 2, 3))


def test_seen_items_are_left_out_but_for_the_held_out_one():
    search, batch = search_of(), users()
    found = search.find(batch, k=NUM_ITEMS, rank_held_out=True, filter_seen=True)
    for user in range(batch.num_users):
        seen = set(batch.seen.values[slice(*batch.seen.offsets[user : user + 2])].tolist())
        seen -= {int(batch.held_out[user])}
        listed = found.items[user][found.items[user] >= 0].tolist()
        assert set(listed) == set(range(NUM_ITEMS)) - seen
        assert (found.items[user, len(listed) :] == -1).all()
        own = found.scores[user, listed.index(int(batch.held_out[user]))]
        above, tied = (found.scores[user] > own).sum(), (found.scores[user] == own).sum() - 1
        assert found.ranks[user] == 1 + above + tied / 2


def test_only_allowed_items_are_found_by_either_kind_of_search():
    allowed = torch.tensor([3, 40, 41, 77])
    found = search_of(allowed=allowed).find(users(), k=6, rank_held_out=False, filter_seen=False)
    assert torch.equal(found.items[:, :4].sort(dim=1).values, allowed.expand(4, -1))
    assert (found.items[:, 4:] == -1).all() and (found.scores[:, 4:] == float("-inf")).all()
    retrieval = make_search(None)
    retrieval.index.restrict(allowed)
    items, scores = retrieval.recommend(make_users(range(5)), 6, filter_seen=False)
    assert torch.equal(items[:, :4].sort(dim=1).values, allowed.expand(5, -1))
    assert (items[:, 4:] == -1).all() and (scores[:, 4:] == float("-inf")).all()


def test_a_free_search_counts_paths_of_no_item():
    search, batch = search_of(SearchConfig(width=60, space="free")), users()
    found = search.find(batch, k=20, rank_held_out=True, filter_seen=False)
    # All 4 * 5 * 3 paths are walked, and those of the catalogue are few.
    distinct = len(semantic_ids().codes.unique(dim=0))
    torch.testing.assert_close(found.measures["hallucination_rate"], torch.full((4,), 1 - distinct / 60))


@pytest.mark.parametrize("space", ["catalogue", "free"])
@pytest.mark.parametrize("among", [None, 2])
def test_hrecall_tells_whether_the_first_prefixes_of_the_beam_hold_that_of_the_target(space, among):
    model, codes = make_generator("tiger").eval(), semantic_ids().codes
    search = GenerativeSearch.build(
        *(model, unsharded_lookup(model), codes),
        config=SearchConfig(width=5, space=space),
        device=CPU,
        recall_among=among,
    )
    batch, rates = users(), []
    kept = search._decode(batch, None).kept
    for target in range(0, NUM_ITEMS, 4):
        held_out = torch.full((batch.num_users,), target)
        found = search.find(
            replace(batch, held_out=held_out), k=5, rank_held_out=True, filter_seen=False
        ).measures
        for depth, nodes in enumerate(kept, start=1):
            first = search._space(batch, None).codes(depth, nodes[:, :among].clamp(min=0))
            hit = (first == codes[target, :depth]).all(-1) & (nodes[:, :among] >= 0)
            assert torch.equal(found[f"hrecall{depth}@{among or 5}"], hit.any(1).float())
            rates.append(hit.any(1).float().mean())
    assert 0 < torch.stack(rates).mean() < 1


def test_seen_items_and_lists_are_filtered_inside_a_free_search():
    batch, allowed = users(), torch.tensor([3, 4, 40, 41, 50, 77, 90])
    seen = search_of(SearchConfig(width=60, space="free"))
    listed = search_of(SearchConfig(width=60, space="free"), allowed)
    codes = semantic_ids().codes
    for search, filter_seen in ((seen, True), (listed, False), (listed, True)):
        found = search.find(batch, k=60, rank_held_out=True, filter_seen=filter_seen)
        scores = search.score(batch, torch.arange(NUM_ITEMS).expand(4, -1))
        for user in range(4):
            may = set(range(NUM_ITEMS)) if search is seen else set(allowed.tolist())
            if filter_seen:
                past = batch.seen.values[slice(*batch.seen.offsets[user : user + 2])].tolist()
                may -= set(past) - {int(batch.held_out[user])}
            # A path stands for the first of its items that is allowed.
            first = {tuple(codes[item].tolist()): item for item in sorted(may, reverse=True)}
            expected = sorted(first.values(), key=lambda item: -scores[user, item])
            count = len(expected)
            assert found.items[user].tolist() == expected + [-1] * (60 - count)
            torch.testing.assert_close(found.scores[user, :count], scores[user, expected], atol=1e-4, rtol=0)


def naive_first_places(drawn: list[int]) -> list[int]:
    return [item for place, item in enumerate(drawn) if item >= 0 and item not in drawn[:place]]


@pytest.mark.parametrize("method", ["sample", "gumbel"])
@pytest.mark.parametrize("space", ["catalogue", "free"])
def test_drawn_lists_hold_each_item_once_in_the_order_drawn(method, space):
    width = 40
    config = SearchConfig(width=width, method=method, space=space, temperature=0.7, top_k=4)
    search, batch = search_of(config), users()
    batch = replace(batch, held_out=batch.items.values[batch.items.offsets[1:] - 1])
    found = search.find(batch, k=width, rank_held_out=True, filter_seen=False)
    drawn = search._decode(batch, None).items.tolist()
    for user in range(4):
        expected = naive_first_places(drawn[user])
        assert found.items[user].tolist() == expected + [-1] * (width - len(expected))
        assert (found.scores[user] > float("-inf")).tolist() == [True] * len(expected) + [False] * (
            width - len(expected)
        )
        target = int(batch.held_out[user])
        if method == "sample":
            expected_rank = 1 + expected.index(target) if target in expected else float("inf")
            assert found.ranks[user] == expected_rank
    assert ("hallucination_rate" in found.measures) == (space == "free")


@pytest.mark.parametrize("method", ["sample", "gumbel"])
def test_draws_belong_to_the_user_and_the_seed(method):
    config, batch = SearchConfig(width=20, method=method), users()
    ask = lambda search, of: search.find(of, k=20, rank_held_out=False, filter_seen=True).items  # noqa: E731
    batch = replace(batch, held_out=None)
    found = ask(search_of(config), batch)
    assert torch.equal(ask(search_of(config), batch), found)
    assert torch.equal(ask(search_of(config), batch.select(2, 4)), found[2:])
    assert not torch.equal(ask(search_of(replace(config, seed=1)), batch), found)
    for user in range(4):
        past = batch.seen.values[slice(*batch.seen.offsets[user : user + 2])]
        assert not torch.isin(found[user], past).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gumbel", "prm": True}, "search.prm and search.earlier-widths are of beams"),
        ({"method": "sample", "earlier_widths": (3, 4)}, "are of beams, and search.method is sample"),
        ({"top_k": 3}, "say what can be drawn"),
        ({"top_p": 0.5}, "say what can be drawn"),
        ({"seed": 1}, "say what can be drawn"),
    ],
)
def test_options_of_beams_and_of_draws_are_not_mixed(options, message):
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "search.temperature must be above 0"),
        ({"temperature": float("nan")}, "search.temperature must be above 0"),
        ({"method": "sample", "top_p": 0.0}, "search.top-p above 0 and at most 1"),
        ({"method": "gumbel", "top_k": 0}, "search.top-k at least 1"),
        ({"earlier_widths": (5, 0)}, "search.earlier-widths must be at least 1 each"),
    ],
)
def test_numbers_that_no_search_can_have_are_refused_by_the_names_of_their_options(options, message):
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**options)


def test_widths_and_lists_that_cannot_be_are_refused():
    with pytest.raises(
        ConfigError, match=r"must not exceed the 97 items of the catalogue, got 98; lower them"
    ):
        search_of(SearchConfig(width=98))
    with pytest.raises(ConfigError, match=r"lists of 11 items need a search.width of at least 11, got 10"):
        search_of(SearchConfig(width=10)).find(users(), k=11, rank_held_out=False, filter_seen=True)


@pytest.mark.parametrize("space", ["catalogue", "free"])
@pytest.mark.parametrize("method", ["beam", "sample", "gumbel"])
def test_a_user_who_has_seen_all_that_may_be_found_gets_an_empty_list_and_others_get_theirs(method, space):
    batch = replace(users(), held_out=None)
    allowed = batch.items.values[:2].unique()
    config = SearchConfig(width=60, method=method, space=space)
    items, scores = search_of(config, allowed).recommend(batch, 3)
    assert (items[0] == -1).all() and (scores[0] == float("-inf")).all()
    for user in range(1, 4):
        own = batch.seen.values[slice(*batch.seen.offsets[user : user + 2])]
        listed = set(items[user].tolist()) - {-1}
        assert listed and listed <= set(allowed.tolist()) - set(own.tolist())


def test_lists_are_read_from_files_of_item_ids(tmp_path):
    items, few, more = make_items(), tmp_path / "few.txt", tmp_path / "more.txt"
    few.write_text("7\n\n 9 \n300\n")
    more.write_text("9\n")
    rows = lambda **lists: allowed_rows(SearchConfig(**lists), items)  # noqa: E731
    assert rows() is None
    assert rows(allow=str(few)).tolist() == [7, 9, 300]
    assert rows(allow=str(few), deny=str(more)).tolist() == [7, 300]
    assert len(rows(deny=str(few))) == items.num_items - 3
    with pytest.raises(ConfigError, match=r"must leave at least one of the 301 items"):
        rows(allow=str(more), deny=str(few))
    with pytest.raises(ConfigError, match=r"search.deny must be a text file of item ids, one a line"):
        rows(deny=str(tmp_path / "none.txt"))
    more.write_text("9\nB0123\n301\n")
    with pytest.raises(DataError, match=r"2 items \(B0123, 301\) are none of them"):
        rows(allow=str(more))


def test_lists_need_exact_retrieval():
    retrieval = make_search(None)
    with pytest.raises(ConfigError, match=r"need evaluation.index exact"):
        type(retrieval).build(
            retrieval.model,
            retrieval.lookup,
            num_items=retrieval.num_items,
            device=CPU,
            approximate=True,
            allowed=torch.tensor([1]),
        )


def test_raw_ids_of_any_type_are_matched():
    items = replace(make_items(), item_ids=pl.Series([f"B{row}" for row in range(301)]))
    assert isinstance(items, ItemTable)
    assert allowed_rows(SearchConfig(), items) is None
