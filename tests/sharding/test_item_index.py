"""The sharded item index against brute force, at several numbers of processes."""

from itertools import chain

import pytest
import torch
from torch import Tensor, nn

from cluster.errors import ConfigError, DivergenceError
from cluster.process import Process
from data_streams.jagged import Jagged
from models.recommender import Retriever
from models.tables import Ids, LookedUp
from sharding import item_index
from sharding.approximate_index import HnswIndex
from sharding.item_index import ItemIndex, best_of_scores, evaluating, rank_in_scores
from tests.process_group import run_on_processes
from trainer.metrics import ndcg_at, recall_at

NUM_ITEMS, DIM, NUM_USERS = 5003, 24, 37
DEVICE = torch.device("cpu")
INFINITY = float("inf")
OPEN_ITEMS = torch.arange(7, NUM_ITEMS, 50)


def jagged(rows: list[list[int]]) -> Jagged:
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return Jagged.from_lengths(torch.tensor(list(chain(*rows)), dtype=torch.int64), lengths)


def one_dimensional(scores: list[float]) -> ItemIndex:
    """An index whose item i scores `scores[i]` for the query (1)."""
    return ItemIndex(torch.tensor(scores)[:, None], num_items=len(scores))


def make_vectors() -> Tensor:
    """Items with two groups of equal vectors that reach across all shards."""
    vectors = torch.randn(NUM_ITEMS, DIM, generator=torch.Generator().manual_seed(1))
    vectors[torch.arange(7, NUM_ITEMS, 50)] = vectors[7].clone()
    vectors[[2, 2600, 4990]] = vectors[0].clone()
    return vectors


def make_users() -> tuple[Tensor, Tensor, Jagged]:
    """Queries, targets, and seen items that hold some of the targets and best items."""
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(NUM_USERS, DIM, generator=generator)
    targets = torch.randint(NUM_ITEMS, (NUM_USERS,), generator=generator)
    targets[:4] = torch.tensor([7, 57, 0, 4990])
    best = (queries @ make_vectors().T).topk(30, dim=1).indices
    seen = [best[user, : user % 30].tolist() + [int(targets[user])] * (user % 2) for user in range(NUM_USERS)]
    return queries, targets, jagged(seen)


def share(process: Process | None, num_users: int = NUM_USERS) -> tuple[int, int]:
    """Users of this rank, unequally many: rank 1 has none where there are three."""
    if process is None:
        return 0, num_users
    borders = {1: [0, num_users], 2: [0, 10, num_users], 3: [0, 12, 12, num_users]}[process.world_size]
    return borders[process.rank], borders[process.rank + 1]


def search_everything(process: Process | None) -> dict[str, Tensor]:
    index = build_index(process)
    queries, targets, seen = make_users()
    first, last = share(process)
    low, high = int(seen.offsets[first]), int(seen.offsets[last])
    own_seen = Jagged.from_lengths(seen.values[low:high], seen.lengths[first:last])
    own_queries, own_targets = queries[first:last], targets[first:last]
    items, scores = index.search(own_queries, 20, own_seen)
    unfiltered, _ = index.search(own_queries, 20)
    restricted = build_index(process)
    restricted.restrict(OPEN_ITEMS)
    several = several_queries(own_queries)
    best_items, best_scores = index.search(several, 20, own_seen)
    return {
        "items of several": best_items,
        "scores of several": best_scores,
        "ranks of several": index.ranks(several, own_targets, own_seen),
        "open": restricted.search(own_queries, len(OPEN_ITEMS), own_seen)[0],
        "ranks of open targets": restricted.ranks(own_queries, OPEN_ITEMS[first:last], own_seen),
        "ranks among open items": restricted.ranks(own_queries, own_targets, own_seen),
        "items": items,
        "scores": scores,
        "unfiltered": unfiltered,
        "ranks": index.ranks(own_queries, own_targets, own_seen),
        "unfiltered ranks": index.ranks(own_queries, own_targets),
    }


def several_queries(queries: Tensor) -> Tensor:
    """Three queries of each user, none of which is best for all items."""
    return torch.stack((queries, queries.roll(1, dims=1), -0.8 * queries), dim=1)


class Rows(Retriever):
    """A model whose item vectors are the rows of its table."""

    def tables(self):
        raise NotImplementedError

    ids = forward = query_ids = query = tables

    def item_ids(self, items: Tensor) -> Ids:
        return {"item": items}

    def item_vectors(self, rows: LookedUp) -> Tensor:
        return rows.rows


def build_index(process: Process | None) -> ItemIndex:
    item_index.LOOKUP_ROWS = 1000  # several lookups per rank
    vectors = make_vectors()

    def lookup(ids: Ids) -> dict[str, LookedUp]:
        return {"item": LookedUp(ids=ids["item"], rows=vectors[ids["item"]])}

    return ItemIndex.build(Rows(), lookup, num_items=NUM_ITEMS, device=DEVICE, process=process)


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return search_everything(None)


def test_search_and_ranks_equal_brute_force(alone):
    queries, targets, seen = make_users()
    # The blocks are needed for equal bits: a plain product rounds differently.
    index = build_index(None)
    scores = torch.empty(NUM_USERS, NUM_ITEMS)
    for item in range(0, NUM_ITEMS, 2048):
        width = min(2048, NUM_ITEMS - item)
        padded = torch.zeros(item_index.QUERY_ROWS, DIM)
        padded[:NUM_USERS] = queries
        scores[:, item : item + width] = (padded @ index.blocks[item // 2048].T)[:NUM_USERS, :width]
    torch.testing.assert_close(scores, queries @ make_vectors().T)
    for user in range(NUM_USERS):
        target, past = int(targets[user]), seen.values[seen.offsets[user] : seen.offsets[user + 1]].tolist()
        own = scores[user].tolist()
        allowed = [item for item in range(NUM_ITEMS) if item not in past]
        expected = sorted(allowed, key=lambda item: (-own[item], item))[:20]
        assert alone["items"][user].tolist() == expected
        assert alone["scores"][user].tolist() == [own[item] for item in expected]
        others = [own[item] for item in allowed if item != target]
        rank = (
            1
            + sum(score > own[target] for score in others)
            + sum(score == own[target] for score in others) / 2
        )
        assert alone["ranks"][user] == rank
    assert (alone["ranks"] % 1 == 0.5).any(), "the case must have ties"
    assert (alone["unfiltered ranks"] >= alone["ranks"]).all()


def test_of_several_queries_the_best_counts_for_each_item(alone):
    queries, targets, seen = make_users()
    index = build_index(None)
    # Each query by itself has the bits of the index; the best of the three is what counts.
    per_query = [index.search(part, NUM_ITEMS) for part in several_queries(queries).unbind(1)]
    scores = torch.full((3, NUM_USERS, NUM_ITEMS), -INFINITY)
    for number, (items, found) in enumerate(per_query):
        scores[number].scatter_(1, items, found)
    best, winners = scores.max(0)
    assert winners.unique().tolist() == [0, 1, 2]
    assert torch.equal(alone["ranks of several"], rank_in_scores(best, targets, seen))
    best[seen.row_index(), seen.values] = -INFINITY
    items, found = best_of_scores(best, 20)
    assert torch.equal(alone["items of several"], items)
    assert torch.equal(alone["scores of several"], found)


def test_one_query_in_a_group_of_its_own_gives_the_same_bits(alone):
    queries, targets, seen = make_users()
    index = build_index(None)
    items, scores = index.search(queries[:, None], 20, seen)
    assert torch.equal(items, alone["items"]) and torch.equal(scores, alone["scores"])
    assert torch.equal(index.ranks(queries[:, None], targets, seen), alone["ranks"])


def test_a_graph_is_refused_for_several_queries():
    index = HnswIndex(ItemIndex(torch.randn(50, 4), num_items=50))
    with pytest.raises(ConfigError, match=r"the model asks with 2; say --evaluation.index exact"):
        index.find(torch.ones(1, 2, 4), k=3)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_number_of_processes_gives_the_same_bits(world_size, alone):
    per_rank = run_on_processes(search_everything, world_size)
    for name, expected in alone.items():
        assert torch.equal(torch.cat([result[name] for result in per_rank]), expected), name


def test_rank_counts_ties_half_and_the_target_itself_never():
    index = one_dimensional([3.0, 1.0, 2.0, 2.0, 2.0, 0.0])
    query = torch.ones(4, 1)
    ranks = index.ranks(query, torch.tensor([0, 2, 1, 5]))
    assert ranks.tolist() == [1.0, 3.0, 5.0, 6.0]  # item 2: one above, two tied


def test_seen_items_are_not_counted_but_a_seen_target_still_is_one():
    index = one_dimensional([3.0, 1.0, 2.0, 2.0, 0.0])
    seen = jagged([[0], [0, 2], [], [2, 2, 3]])
    ranks = index.ranks(torch.ones(4, 1), torch.tensor([2, 2, 2, 2]), seen)
    assert ranks.tolist() == [1.5, 1.5, 2.5, 2.0]


def test_a_closed_target_is_behind_any_list_and_an_open_one_is_ranked_among_the_open(alone):
    _, targets, _ = make_users()
    is_open = torch.isin(targets, OPEN_ITEMS)
    assert is_open.any() and not is_open.all()
    ranks = alone["ranks among open items"]
    assert torch.equal(ranks == INFINITY, ~is_open)
    assert ranks[is_open].max() <= len(OPEN_ITEMS)
    assert alone["ranks of open targets"].max() <= len(OPEN_ITEMS)
    assert set(alone["open"].unique().tolist()) <= {*OPEN_ITEMS.tolist(), -1}


def test_a_restricted_index_is_exact_by_hand():
    index = one_dimensional([3.0, 1.0, 2.0, 2.0, 0.0])
    index.restrict(torch.tensor([1, 3, 4]))
    ranks = index.ranks(torch.ones(4, 1), torch.tensor([0, 1, 2, 3]))
    assert ranks.tolist() == [INFINITY, 2.0, INFINITY, 1.0]
    assert (recall_at(ranks.numpy(), 5).tolist(), ndcg_at(ranks.numpy(), 5)[0]) == ([0, 1, 0, 1], 0)
    with pytest.raises(ConfigError, match=r"need evaluation.index exact"):
        HnswIndex(index)


def test_a_graph_of_all_neighbours_ranks_as_the_exact_index_does():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(100, 16, generator=generator)
    # Ties: the same vectors twice.
    index = ItemIndex(torch.cat((vectors, vectors)), num_items=200)
    queries = vectors[:4] + 0.5 * torch.randn(4, 16, generator=generator)
    seen = Jagged.from_lengths(torch.tensor([0, 7, 1, 102, 9, 3]), torch.tensor([2, 2, 1, 1]))
    targets = torch.arange(4)
    exact = index.find(queries, seen, k=5, targets=targets)
    found = HnswIndex(index).find(queries, seen, k=5, targets=targets)
    assert found.ranks.tolist() == exact.ranks.tolist()
    assert found.items.tolist() == exact.items.tolist()
    torch.testing.assert_close(found.scores, exact.scores)


def test_a_list_longer_than_what_is_left_ends_in_empty_slots():
    index = one_dimensional([0.5, -1.0, 2.0])
    items, scores = index.search(torch.ones(2, 1), 5, jagged([[], [2, 0]]))
    assert items.tolist() == [[2, 0, 1, -1, -1], [1, -1, -1, -1, -1]]
    assert scores[0].tolist() == [2.0, 0.5, -1.0, -INFINITY, -INFINITY]
    assert scores[1].tolist() == [-1.0, *[-INFINITY] * 4]


def test_equal_scores_go_to_the_smaller_item_and_zeros_are_equal_whatever_their_sign():
    index = one_dimensional([0.0, -0.0, 1.0, -0.0, 1.0])
    items, _ = index.search(torch.ones(1, 1), 5)
    assert items.tolist() == [[2, 4, 0, 1, 3]]
    assert index.ranks(torch.ones(1, 1), torch.tensor([1])).tolist() == [4.0]


def test_more_queries_than_a_chunk_are_all_answered():
    vectors = torch.randn(70, 6, generator=torch.Generator().manual_seed(3))
    queries = torch.randn(item_index.QUERY_ROWS + 3, 6, generator=torch.Generator().manual_seed(4))
    seen = jagged([[user % 70] for user in range(len(queries))])
    items, _ = ItemIndex(vectors, num_items=70).search(queries, 70, seen)
    for user, found in enumerate(items.tolist()):
        assert found[-1] == -1
        assert sorted(found[:-1]) == [item for item in range(70) if item != user % 70]


def test_scores_that_are_all_there_are_ranked_by_the_same_rules():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]]).repeat(2, 1)
    assert rank_in_scores(scores, torch.tensor([2, 3]), jagged([[0, 2], []])).tolist() == [1.5, 2.5]
    items, best = best_of_scores(scores[:1], 7)
    assert items.tolist() == [[0, 2, 3, 1, 4, -1, -1]]
    assert best[0, 5:].tolist() == [-INFINITY, -INFINITY]


def test_a_diverged_model_is_refused_and_not_ranked():
    with pytest.raises(DivergenceError, match="item vectors must be finite to be ranked, and 1 of 2 are not"):
        one_dimensional([1.0, float("nan")])
    with pytest.raises(DivergenceError, match=r"query vectors must be finite.*1 of 2 are not"):
        one_dimensional([1.0, 2.0]).search(torch.tensor([[1.0], [INFINITY]]), 1)
    with pytest.raises(DivergenceError, match=r"query vectors must be finite.*1 of 2 are not"):
        HnswIndex(one_dimensional([1.0, 2.0])).find(torch.tensor([[1.0], [float("nan")]]), k=1)


def test_evaluating_switches_dropout_and_gradients_off_and_back():
    model = nn.Dropout(0.5)
    with evaluating(model):
        assert not model.training
        assert not torch.is_grad_enabled()
    assert model.training
    assert torch.is_grad_enabled()
