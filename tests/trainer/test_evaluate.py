"""Evaluation and recommendation of a small SASRec at one and two workers, and by hand."""

import dataclasses
import io
import json
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console

from cluster.errors import DataError
from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.item_table import ItemTable
from data_streams.jagged import Jagged
from models.objectives.sampled_softmax import SampledSoftmax
from models.recommender import Recommender
from models.sasrec import SASRec
from models.tables import Lookup
from sharding.configuration import ShardingConfig
from sharding.lookup import make_lookup
from sharding.unsharded import UnshardedTables
from tests.process_group import run_on_processes
from trainer.configuration import EvaluationConfig
from trainer.evaluate import (
    EvaluationResult,
    evaluate,
    recommend,
    recommendation_table,
    render,
    validation_metrics,
)
from trainer.metrics import ndcg_at, recall_at
from trainer.search import RetrievalSearch, ScorerSearch
from trainer.slices import by_training_events

NUM_ITEMS, NUM_USERS, MAX_LENGTH = 301, 43, 8
CPU = torch.device("cpu")
CONFIG = EvaluationConfig(cutoffs=(5, 10), bootstrap_resamples=50)


def make_items() -> ItemTable:
    random = np.random.default_rng(0)
    return ItemTable(
        item_ids=pl.Series(range(NUM_ITEMS)),
        titles=pl.Series([f"item {row}" for row in range(NUM_ITEMS)]),
        categories=None,
        train_counts=random.integers(0, 9, NUM_ITEMS),
        embeddings=random.normal(size=(NUM_ITEMS, 5)).astype(np.float16),
    )


def make_batch(users: range) -> SequenceBatch:
    """Users whose histories follow from their number; every fifth has seen the held-out item before."""
    items, seen, held_out = [], [], []
    for user in users:
        generator = torch.Generator().manual_seed(user)
        past = torch.randint(NUM_ITEMS, (1 + user % 15,), generator=generator)
        held_out.append(past[0] if user % 5 == 0 else torch.randint(NUM_ITEMS, (), generator=generator))
        seen.append(past)
        items.append(past[-MAX_LENGTH:])
    nothing = torch.zeros(0, dtype=torch.int64)
    return SequenceBatch(
        user_ids=torch.arange(users.start, users.stop),
        items=Jagged.from_lengths(
            torch.cat([nothing, *items]), torch.tensor([len(row) for row in items]).long()
        ),
        held_out=torch.tensor(held_out, dtype=torch.int64),
        seen=Jagged.from_lengths(
            torch.cat([nothing, *seen]), torch.tensor([len(row) for row in seen]).long()
        ),
    )


def own_batches(process: Process | None) -> list[SequenceBatch]:
    """Alone: batches of 10. Of two ranks the second has a single batch of two users."""
    if process is None or process.world_size == 1:
        borders = [*range(0, NUM_USERS, 10), NUM_USERS]
    else:
        borders = [[0, 12, 13, 30, 41], [41, 43]][process.rank]
    return [make_batch(range(*pair)) for pair in pairwise(borders)]


def lookup_for(model: Recommender, process: Process | None) -> Lookup:
    """Freshly initialised tables, sharded where there are processes."""
    if process is None:
        tables = UnshardedTables(model.tables(), seed=1, learning_rate=0.1, device=CPU)
    else:
        from sharding.apply import ShardedTables

        tables = ShardedTables(
            model.tables(), process=process, config=ShardingConfig(), seed=1, learning_rate=0.1
        )
    return make_lookup(model.tables(), tables, None, CPU)


def make_search(process: Process | None) -> RetrievalSearch:
    torch.manual_seed(0)
    objective = SampledSoftmax.Config().build(num_items=NUM_ITEMS)
    config = SASRec.Config(width=16, num_blocks=1, dropout=0.5, init_scale=0.3)
    model = config.build(num_items=NUM_ITEMS, max_length=MAX_LENGTH, item_feature_dim=0, objective=objective)
    lookup = lookup_for(model, process)
    return RetrievalSearch.build(model, lookup, num_items=NUM_ITEMS, device=CPU, process=process)


def run_all(process: Process | None) -> dict:
    search, empty = make_search(process), make_batch(range(0))
    arguments = {"empty_batch": empty, "config": CONFIG}
    result = evaluate(search, own_batches(process), items=make_items(), split="test", **arguments)
    raw = dataclasses.replace(CONFIG, filter_seen=False)
    unfiltered = validation_metrics(search, own_batches(process), empty_batch=empty, config=raw)
    found = list(recommend(search, own_batches(process), k=7, empty_batch=empty))
    return {
        "result": result.to_json(),
        "validation": validation_metrics(search, own_batches(process), **arguments),
        "unfiltered": unfiltered,
        "users": torch.cat([users for users, _, _ in found]),
        "items": torch.cat([items for _, items, _ in found]),
        "training": search.model.training,
    }


@pytest.fixture(scope="module")
def alone() -> dict:
    return run_all(None)


def test_two_workers_with_uneven_batches_give_what_one_gives(alone):
    first, second = run_on_processes(run_all, 2)
    assert first["result"] == second["result"]
    assert first["result"]["num_users"] == NUM_USERS
    assert first["result"]["seen_held_out"] == alone["result"]["seen_held_out"]
    for name in ("metrics", "intervals"):
        assert first["result"][name].keys() == alone["result"][name].keys()
        for metric, value in alone["result"][name].items():
            assert first["result"][name][metric] == pytest.approx(value, rel=1e-6), metric
    assert first["validation"] == pytest.approx(alone["validation"])
    assert torch.cat([first["users"], second["users"]]).tolist() == list(range(NUM_USERS))
    assert torch.equal(torch.cat([first["items"], second["items"]]), alone["items"])


def test_metrics_are_those_of_full_scores(alone):
    search, batch = make_search(None), make_batch(range(NUM_USERS))
    every_item = torch.arange(NUM_ITEMS).expand(NUM_USERS, -1)
    scores = search.score(batch, every_item)
    held_out = scores.gather(1, batch.held_out[:, None])
    raw_ranks = 1 + (scores > held_out).sum(1).numpy()
    scores[batch.seen.row_index(), batch.seen.values] = float("-inf")
    ranks = 1 + (scores > held_out).sum(1).numpy()
    metrics = alone["result"]["metrics"]
    assert metrics["recall@10"] == pytest.approx(recall_at(ranks, 10).mean())
    assert metrics["ndcg@5"] == pytest.approx(ndcg_at(ranks, 5).mean())
    assert metrics["mrr"] == pytest.approx((1 / ranks).mean())
    assert alone["unfiltered"]["mrr"] == pytest.approx((1 / raw_ranks).mean())
    assert alone["unfiltered"]["mrr"] != alone["validation"]["mrr"]
    assert alone["validation"].items() <= metrics.items()
    assert torch.equal(alone["items"], scores.topk(7).indices)
    counts = make_items().train_counts[batch.held_out.numpy()]
    slices = by_training_events(counts, {"recall@10": recall_at(ranks, 10), "mrr": 1 / ranks})
    assert len(slices) > 1 and slices.keys() == alone["result"]["slices"].keys()
    for name, expected in slices.items():
        found = alone["result"]["slices"][name]
        assert {metric: found[metric] for metric in expected} == pytest.approx(expected)


def test_the_model_is_asked_without_dropout_and_trains_on_afterwards(alone):
    assert alone["training"]
    assert torch.equal(run_all(None)["items"], alone["items"])


def test_evaluation_json_has_the_keys_that_scripts_rely_on(alone):
    content = json.loads(json.dumps(alone["result"]))
    assert list(content) == [
        "split",
        "num_users",
        "seen_filtered",
        "seen_held_out",
        "metrics",
        "intervals",
        "slices",
        "checkpoint",
        "step",
    ]
    assert (content["split"], content["num_users"], content["seen_filtered"]) == ("test", NUM_USERS, True)
    kinds = ("recall", "ndcg", "novelty", "head_share", "diversity", "coverage")
    assert content["metrics"].keys() == {f"{kind}@{k}" for kind in kinds for k in (5, 10)} | {"mrr"}
    assert content["intervals"].keys() == content["metrics"].keys() - {"coverage@5", "coverage@10"}
    assert sum(means["num_users"] for means in content["slices"].values()) == NUM_USERS
    low, high = content["intervals"]["recall@10"]
    assert low <= content["metrics"]["recall@10"] <= high


def test_a_user_who_comes_twice_is_an_error():
    batches = [make_batch(range(5)), make_batch(range(4, 8))]
    with pytest.raises(DataError, match="every user must be evaluated once, and 1 were evaluated more often"):
        validation_metrics(make_search(None), batches, empty_batch=make_batch(range(0)), config=CONFIG)


def test_no_users_at_all_are_an_error():
    with pytest.raises(DataError, match="needs users with a held-out item, and there are none"):
        validation_metrics(make_search(None), [], empty_batch=make_batch(range(0)), config=CONFIG)
    asked = dataclasses.replace(CONFIG, held_out_action="cart")
    with pytest.raises(
        DataError, match=r"the action cart \(evaluation.held-out-action\), and there are none"
    ):
        validation_metrics(make_search(None), [], empty_batch=make_batch(range(0)), config=asked)


def test_seen_items_cannot_be_left_out_where_they_are_not_known():
    batch = dataclasses.replace(make_batch(range(3)), seen=None)
    with pytest.raises(DataError, match=r"each user's whole known past .*--evaluation.no-filter-seen"):
        make_search(None).recommend(batch, 3)


def test_candidates_are_scored_like_the_same_items_in_a_list():
    search, batch = make_search(None), make_batch(range(6))
    items, scores = search.recommend(batch, 4)
    items[0, 2] = -1
    again = search.score(batch, items)
    assert again[0, 2] == float("-inf")
    torch.testing.assert_close(again[1:], scores[1:])


def test_a_scoring_function_is_searched_by_the_same_rules():
    batch = make_batch(range(9))
    retrieval = make_search(None)
    scorer = ScorerSearch(
        lambda users: retrieval.score(users, torch.arange(NUM_ITEMS).expand(9, -1)), NUM_ITEMS
    )
    expected = retrieval.find(batch, k=5, rank_held_out=True, filter_seen=True)
    found = scorer.find(batch, k=5, rank_held_out=True, filter_seen=True)
    assert torch.equal(found.items, expected.items)
    assert torch.equal(found.ranks, expected.ranks)


def test_recommendations_become_a_table_without_empty_slots():
    table = recommendation_table(
        torch.tensor([4, 9]), torch.tensor([[3, 1], [2, -1]]), torch.tensor([[0.5, 0.25], [1.0, -torch.inf]])
    )
    assert table.to_pydict() == {
        "user_row": [4, 4, 9], "rank": [1, 2, 1], "item_row": [3, 1, 2], "score": [0.5, 0.25, 1.0]
    }  # fmt: skip


def test_the_printed_table_says_whether_seen_items_were_left_out():
    arguments = {"empty_batch": make_batch(range(0)), "items": make_items(), "split": "valid"}
    for filter_seen, words in ((True, "seen items left out"), (False, "seen items not left out")):
        config = dataclasses.replace(CONFIG, filter_seen=filter_seen)
        result = evaluate(make_search(None), own_batches(None), config=config, **arguments)
        assert "valid split, 43 users" in printed({"sasrec": result})
        assert f" {words} " in printed({"sasrec": result})
        batch = make_batch(range(NUM_USERS))
        pasts = batch.seen.values.split(batch.seen.lengths.tolist())
        again = sum(int(item in past) for item, past in zip(batch.held_out, pasts, strict=True)) * filter_seen
        assert result.seen_held_out == again
        assert (f"but for the held-out ones of {again} users" in printed({"sasrec": result})) == filter_seen
        low, high = result.intervals["mrr"]
        assert f"{low:.4f} to {high:.4f}" in printed({"sasrec": result})
        assert f"{result.metrics['mrr']:.4f}" in printed({"sasrec": result, "popularity": result})


def test_a_metric_that_another_system_lacks_is_an_empty_cell():
    first = EvaluationResult(
        split="test", num_users=1, seen_filtered=True, metrics={"mrr": 0.5, "hrecall1@50": 0.25}
    )
    rows = printed({"tiger": first, "popularity": dataclasses.replace(first, metrics={"mrr": 0.125})})
    cells = [[cell.strip() for cell in row.split("│")[1:-1]] for row in rows.splitlines() if "│" in row]
    assert cells == [["mrr", "0.5000", "0.1250"], ["hrecall1@50", "0.2500", ""]]


def printed(results: dict[str, EvaluationResult]) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(render(results))
    return console.file.getvalue()
