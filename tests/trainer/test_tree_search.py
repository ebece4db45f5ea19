"""The tree beam as evaluation and `grail recommend` use it: against brute force, with lists, and refusals."""

from dataclasses import replace

import pytest
import torch

from cluster.errors import ConfigError
from models.node_scorer import NodeGuide
from tests.generator_cases import NUM_ITEMS, TREES, make_generator, tree_ids, unsharded_lookup
from tests.trainer.test_generative_search import users
from tests.training_cases import make_batch
from trainer.configuration import SearchConfig
from trainer.tree_search import TreeSearch

CPU = torch.device("cpu")
EVERYTHING = SearchConfig(width=NUM_ITEMS)
everyone = pytest.mark.parametrize("name", TREES)


def search_of(name: str = "tdm", config: SearchConfig = EVERYTHING, **options) -> TreeSearch:
    model = make_generator(name).eval()
    return TreeSearch.build(
        model, unsharded_lookup(model), tree_ids().codes, config=config, device=CPU, **options
    )


def every_score(search: TreeSearch, batch) -> torch.Tensor:
    return search.score(batch, torch.arange(NUM_ITEMS).expand(batch.num_users, -1))


@everyone
def test_a_beam_as_wide_as_the_leaves_ranks_all_items_by_the_scores_of_their_leaves(name):
    search, batch = search_of(name), users()
    scores = every_score(search, batch)
    found = search.find(batch, k=NUM_ITEMS, rank_held_out=True, filter_seen=False)
    torch.testing.assert_close(found.scores, scores.sort(dim=1, descending=True).values, rtol=1e-5, atol=1e-6)
    own = scores.gather(1, batch.held_out[:, None])
    assert torch.equal(found.ranks, 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2)
    assert all(found.measures[f"hrecall{depth}@{NUM_ITEMS}"].eq(1).all() for depth in range(1, 8))


@everyone
def test_seen_and_denied_items_are_left_out(name):
    batch, allowed = users(), torch.arange(0, NUM_ITEMS, 2)
    search = search_of(name, allowed=allowed)
    items, scores = search.recommend(batch, NUM_ITEMS, filter_seen=True)
    for user in range(batch.num_users):
        seen = set(batch.seen.values[slice(*batch.seen.offsets[user : user + 2])].tolist())
        listed = items[user][items[user] >= 0].tolist()
        assert sorted(listed) == sorted(set(allowed.tolist()) - seen)
        assert (items[user, len(listed) :] == -1).all() and scores[user, len(listed) :].isneginf().all()


def naive_beam(search: TreeSearch, batch, width: int) -> list[list[int]]:
    """Level by level and user by user, with all nodes of a level scored in a table."""
    model, lookup = search.model, search.lookup
    state = model.prefill(lookup(model.prompt_ids(batch)), batch)
    guide, nodes = NodeGuide(model, state, batch, lookup), model.nodes
    beams = [[0] for _ in range(batch.num_users)]
    for depth in nodes.depths:
        existing = nodes.trie.prefixes[depth]
        with torch.no_grad():
            table = guide.scores(depth, existing.expand(batch.num_users, -1))
        for user, beam in enumerate(beams):
            scored = dict(zip(existing.tolist(), table[user].tolist(), strict=True))
            children = [place for place in scored if place // 2 in beam]
            beams[user] = sorted(children, key=lambda place: -scored[place])[:width]
    return [[int(nodes.rows(nodes.depth, torch.tensor(place))) for place in beam] for beam in beams]


@everyone
def test_a_narrow_beam_keeps_the_best_nodes_of_each_level_and_scores_two_for_each(name, monkeypatch):
    width, batch = 5, users()
    search = search_of(name, SearchConfig(width=width))
    expected, scored = naive_beam(search, batch, width), []
    inner = NodeGuide.scores

    def counted(guide, depth, places):
        scored.append(places.shape[1])
        return inner(guide, depth, places)

    monkeypatch.setattr(NodeGuide, "scores", counted)
    items, _ = search.recommend(batch, width, filter_seen=False)
    assert items.tolist() == expected
    assert len(scored) == 7 and max(scored) <= 2 * width


@everyone
def test_a_rank_without_users_searches_too(name):
    batch = make_batch([])
    empty = replace(batch, held_out=torch.zeros(0, dtype=torch.int64), seen=batch.items)
    found = search_of(name).find(empty, k=5, rank_held_out=True, filter_seen=True)
    assert found.items.shape == (0, 5) and found.ranks.shape == (0,)


def test_candidates_that_are_none_have_no_score():
    search, batch = search_of(), users()
    scores = search.score(batch, torch.tensor([[3, -1]]).expand(batch.num_users, -1))
    assert scores[:, 1].isneginf().all() and scores[:, 0].isfinite().all()
    torch.testing.assert_close(scores[:, 0], every_score(search, batch)[:, 3])


@pytest.mark.parametrize(
    "options",
    [{"method": "gumbel"}, {"space": "free"}, {"prm": True}, {"temperature": 5.0}, {"over": "allowed"}],
    ids=lambda options: next(iter(options)),
)
def test_other_searches_are_refused(options):
    with pytest.raises(
        ConfigError, match=r"a tree is searched by a beam over its own nodes, .* and got search.*leave"
    ):
        search_of(config=replace(EVERYTHING, **options))
