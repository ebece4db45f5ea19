"""Search under conditions and by neighbours: against naive searches, and on two workers."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import torch

from cluster.errors import ConfigError, DataError
from cluster.process import Process
from data_streams.configuration import DataConfig
from data_streams.item_conditions import ItemConditions
from data_streams.jagged import Jagged
from models.climber_pilot import ClimberPilot
from models.objectives.sampled_softmax import SampledSoftmax
from models.tiger import Tiger
from tests.process_group import run_on_processes
from tests.trainer.test_evaluate import (
    CPU,
    MAX_LENGTH,
    NUM_ITEMS,
    NUM_USERS,
    lookup_for,
    make_batch,
    make_items,
)
from tests.trainer.test_generative_search import search_of as generative_search
from tests.trainer.test_generative_search import users as generated_users
from trainer.checks import check
from trainer.conditions import conditional_search, load_conditions
from trainer.configuration import EvaluationConfig, PretrainConfig, SearchConfig
from trainer.evaluate import evaluate
from trainer.search import RetrievalSearch, Search

CONFIG = EvaluationConfig(cutoffs=(5, 10), bootstrap_resamples=0, filter_from=4)
KINDS = ItemConditions.of(
    "kind", pl.Series([["all", f"third {item % 3}"] if item % 50 else ["all"] for item in range(NUM_ITEMS)])
)


def make_search(process: Process | None = None, *, approximate: bool = False) -> RetrievalSearch:
    torch.manual_seed(0)
    config = ClimberPilot.Config(width=16, num_blocks=1, init_scale=0.3, condition_column="kind")
    model = config.build(
        num_items=NUM_ITEMS,
        max_length=MAX_LENGTH,
        item_feature_dim=0,
        objective=SampledSoftmax.Config().build(num_items=NUM_ITEMS),
        condition_table=KINDS.table,
        condition_names=tuple(KINDS.names),
    )
    lookup = lookup_for(model, process)
    return RetrievalSearch.build(
        model, lookup, num_items=NUM_ITEMS, device=CPU, process=process, approximate=approximate
    )


def under(condition: str, *conditions: str, process: Process | None = None) -> Search:
    config = replace(CONFIG, condition=condition, conditions=conditions)
    return conditional_search(make_search(process), KINDS, config)


def test_conditions_are_the_values_of_a_column_by_hand():
    kinds = ItemConditions.of("kind", pl.Series([["b", "a", "b"], [], ["a"], None]))
    assert (kinds.names, kinds.counts.tolist()) == (["a", "b"], [2, 1])
    assert [sorted(row) for row in kinds.table.tolist()] == [[0, 1], [-1, -1], [-1, 0], [-1, -1]]
    assert kinds.narrowest(np.array([0, 2, 3])).tolist() == [1, 0, -1]
    assert kinds.met(np.array([[0, 2, -1], [3, 1, 0]]), np.array([1, -1])).tolist() == [
        [True, False, False],
        [True, True, True],
    ]
    assert ItemConditions.of("year", pl.Series([2001, 1999, 2001])).names == ["1999", "2001"]


def test_columns_and_names_that_are_no_conditions_are_refused():
    with pytest.raises(ConfigError, match=r"no item has the kind 'third1'; did you mean 'third 1'\?"):
        KINDS.find("third1")
    with pytest.raises(ConfigError, match=r"the item column price holds Float64; name another column"):
        ItemConditions.of("price", pl.Series([1.5]))
    with pytest.raises(DataError, match=r"the item column kind holds no values"):
        ItemConditions.of("kind", pl.Series([None], dtype=pl.String))


def naive_scores(search: RetrievalSearch, batch, condition: int) -> torch.Tensor:
    queries = search.queries_under(batch, torch.full((batch.num_users, 1), condition))[:, 0]
    scores = search.score_with(queries, torch.arange(NUM_ITEMS).expand(batch.num_users, -1))
    scores[batch.seen.row_index(), batch.seen.values] = float("-inf")
    return scores


def test_the_model_is_asked_under_the_condition_of_the_held_out_item():
    batch, search = make_batch(range(12)), under("attention")
    found = search.find(batch, k=5, rank_held_out=True, filter_seen=True)
    narrowest = KINDS.narrowest(batch.held_out.numpy())
    assert len(set(narrowest.tolist())) > 1
    for user in range(12):
        alone = batch.select(user, user + 1)
        scores = naive_scores(search.search, alone, int(narrowest[user]))[0]
        assert found.items[user].tolist() == scores.topk(5).indices.tolist()
        target = int(batch.held_out[user])
        own = float(search.score(alone, torch.tensor([[target]])))
        others = torch.cat((scores[:target], scores[target + 1 :]))
        assert found.ranks[user] == 1 + (others > own).sum()


def test_several_conditions_give_one_list_of_distinct_items():
    batch, search = make_batch(range(9)), under("attention", "third 0", "third 2", "all")
    items, scores = search.recommend(batch, 20)
    each = torch.stack([naive_scores(search.search, batch, one) for one in search.fixed])
    best = each.amax(0)
    assert all(len(set(row)) == 20 for row in items.tolist())
    torch.testing.assert_close(scores, best.topk(20).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(best.gather(1, items), scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(search.score(batch, items), scores, rtol=1e-5, atol=1e-5)


def test_of_several_conditions_the_one_that_ranks_a_held_out_item_best_counts():
    batch, names = make_batch(range(9)), ("third 0", "third 2", "all")
    ask = lambda *some: under("attention", *some).find(batch, k=3, rank_held_out=True, filter_seen=True)  # noqa: E731
    each = torch.stack([ask(name).ranks for name in names])
    assert (each.amin(0) < each.amax(0)).any()
    assert torch.equal(ask(*names).ranks, each.amin(0))


def test_filtering_takes_items_that_do_not_meet_the_condition_out_of_a_longer_list():
    batch, search = make_batch(range(9)), under("filter", "third 1")
    found = search.find(batch, k=6, rank_held_out=True, filter_seen=True)
    longer, _ = make_search().recommend(batch, 40)
    for user, row in enumerate(longer.tolist()):
        kept = [item for item in row if item % 3 == 1 and item % 50]
        assert found.items[user].tolist() == (kept + [-1] * 6)[:6]
        target = int(batch.held_out[user])
        assert found.ranks[user] == (kept.index(target) + 1 if target in kept else float("inf"))
    assert torch.equal(found.scores == float("-inf"), found.items < 0)
    assert search.score(batch, torch.tensor([[1, 3, -1]]).expand(9, -1))[:, 1:].max() == float("-inf")


@pytest.mark.parametrize("generates", [False, True])
def test_a_condition_that_all_items_meet_changes_no_rank_of_known_items_either(generates):
    kinds = ItemConditions.of("kind", pl.Series([["all"]] * (100 if generates else NUM_ITEMS)))
    search = generative_search(SearchConfig(width=97)) if generates else make_search()
    batch = generated_users() if generates else make_batch(range(9))
    known = Jagged.from_lengths(batch.held_out, torch.ones(batch.num_users, dtype=torch.int64))
    batch = replace(batch, seen=known)
    config = replace(CONFIG, condition="filter", conditions=("all",), cutoffs=(5,), filter_from=NUM_ITEMS)
    if generates:
        config = replace(config, cutoffs=(97,), filter_from=1)
    found = conditional_search(search, kinds, config).find(batch, k=5, rank_held_out=True, filter_seen=True)
    plain = search.find(batch, k=search.num_items, rank_held_out=True, filter_seen=True)
    if generates:
        places = (plain.items == batch.held_out[:, None]).int().argmax(1) + 1
        assert torch.equal(found.ranks, places.float())
    else:
        assert torch.equal(found.ranks, plain.ranks)


def test_what_a_model_generates_is_filtered_where_its_beam_is_wide_enough():
    batch, kinds = generated_users(), ItemConditions.of("kind", pl.Series(["even", "odd"] * 50))
    config = replace(CONFIG, condition="filter", conditions=("odd",))
    filtered = conditional_search(generative_search(SearchConfig(width=40, space="free")), kinds, config)
    found = filtered.find(batch, k=6, rank_held_out=True, filter_seen=True)
    longer = filtered.search.find(batch, k=40, rank_held_out=True, filter_seen=True).items
    for user, row in enumerate(longer.tolist()):
        kept = [item for item in row if item >= 0 and item % 2]
        assert found.items[user].tolist() == (kept + [-1] * 6)[:6]
        target = int(batch.held_out[user])
        assert found.ranks[user] == (kept.index(target) + 1 if target in kept else float("inf"))
    assert found.measures.keys() == {"hallucination_rate"}
    assert filtered.met(found.items.numpy(), batch.held_out.numpy())[(found.items >= 0).numpy()].all()
    narrow = conditional_search(generative_search(SearchConfig(width=39)), kinds, config)
    with pytest.raises(ConfigError, match=r"looks at 40 items.* longest list of 10, .*search.width.* got 39"):
        narrow.recommend(batch, 6)


def test_a_model_that_generates_is_not_trained_under_conditions():
    config = PretrainConfig(
        model=Tiger.Config(),
        data=DataConfig(semantic_ids="ids"),
        evaluation=replace(CONFIG, condition="filter"),
    )
    with pytest.raises(ConfigError, match=r"condition filter is for evaluation and serving .* leave it out"):
        check(config)


def run_all(process: Process | None) -> dict:
    borders = [0, 13, NUM_USERS] if process is None else [[0, 20, 30], [30, NUM_USERS]][process.rank]
    batches = [make_batch(range(*pair)) for pair in pairwise(borders)]
    arguments = {
        "empty_batch": make_batch(range(0)),
        "items": make_items(),
        "split": "test",
        "config": CONFIG,
    }
    searches = {"attention": under("attention", process=process), "filter": under("filter", process=process)}
    searches["hnsw"] = make_search(process, approximate=True)
    return {name: evaluate(search, batches, **arguments).metrics for name, search in searches.items()}


def test_two_workers_find_what_one_finds_and_tell_how_many_items_meet_the_condition():
    alone, (first, second) = run_all(None), run_on_processes(run_all, 2)
    assert first == second, "the result is the same on every rank"
    # Two graphs look further down the list than one: a rank far behind may be known to them alone.
    del alone["hnsw"]["mrr"], first["hnsw"]["mrr"]
    for name, metrics in alone.items():
        assert first[name] == pytest.approx(metrics, rel=1e-5), name
    assert alone["filter"]["condition@10"] == 1.0
    assert 0.2 < alone["attention"]["condition@10"] < 0.8
    assert "condition@10" not in alone["hnsw"]


def test_the_graph_of_neighbours_finds_what_the_exact_search_finds():
    batch = make_batch(range(30))
    found = make_search(approximate=True).find(batch, k=10, rank_held_out=True, filter_seen=True)
    exact = make_search().find(batch, k=10, rank_held_out=True, filter_seen=True)
    assert torch.equal(found.items, exact.items)
    torch.testing.assert_close(found.scores, exact.scores)
    compared = exact.ranks < 200
    assert compared.any() and torch.equal(found.ranks[compared], exact.ranks[compared])
    assert set(found.ranks[exact.ranks > 270].tolist()) <= {float(NUM_ITEMS)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditions": ("a",)}, r"evaluation.conditions a need evaluation.condition attention"),
        ({"condition": "filter"}, r"needs evaluation.condition-column, the item column"),
        (
            {"condition": "attention", "condition_column": "kind"},
            r"needs a model trained with model.condition-column kind, this one has none",
        ),
    ],
)
def test_conditions_that_cannot_be_asked_for_are_refused(options, message):
    config = PretrainConfig(model=ClimberPilot.Config(), evaluation=replace(CONFIG, **options))
    with pytest.raises(ConfigError, match=message):
        load_conditions(config)


def test_a_condition_must_be_named_where_nothing_is_held_out():
    with pytest.raises(ConfigError, match=r"say --condition kind=VALUE"):
        under("attention").recommend(replace(make_batch(range(2)), held_out=None), 3)
