import pytest
import torch

from data_streams.jagged import Jagged
from models.tables import Attributes, TableSpec
from sharding.lookup import make_lookup, merge_ids, rows_of_request
from sharding.tables import hash_twice
from sharding.unsharded import UnshardedTables

CPU = torch.device("cpu")
ITEM = TableSpec(name="item", num_rows=4, dim=3, features=("history", "candidate"))
USER = TableSpec(
    name="user", num_rows=2, dim=3, features=("user",), rows_are_items=False, rows_are_users=True
)
VALUES = [[10, 11], [], [10], [12, 11, 13]]
"""Attributes of each item."""


def attributes(rows) -> Attributes:
    values = torch.tensor([value for row in rows for value in row], dtype=torch.int64)
    return Attributes(ids=Jagged.from_lengths(values, torch.tensor([len(row) for row in rows])), hash_rows=8)


SPECS = [ITEM, USER, attributes(VALUES).table(ITEM), attributes([[20], [21]]).table(USER)]


def naive(tables: UnshardedTables, item: int) -> torch.Tensor:
    own, described = tables.rows["item"][item].clone(), tables.rows["item_attributes"]
    for value in VALUES[item]:
        own += described[hash_twice(torch.tensor([value]), 8)].sum(0)
    return own


def test_rows_come_with_the_sum_of_those_of_their_attributes():
    tables = UnshardedTables(SPECS, seed=1, learning_rate=0.1, device=CPU)
    lookup = make_lookup(SPECS, tables, None, CPU)
    found = lookup({"history": torch.tensor([3, 0, 1, 3]), "user": torch.tensor([1])})
    assert found.keys() == {"history", "user"}
    expected = torch.stack([naive(tables, item) for item in (3, 0, 1, 3)])
    torch.testing.assert_close(found["history"].rows, expected)
    value = tables.rows["user_attributes"][hash_twice(torch.tensor([21]), 8)].sum(0)
    torch.testing.assert_close(found["user"].rows[0], tables.rows["user"][1] + value)


def test_items_without_any_attributes_and_no_items_at_all_are_looked_up():
    lookup = make_lookup(SPECS, UnshardedTables(SPECS, seed=1, learning_rate=0.1, device=CPU), None, CPU)
    for items in ([1, 1], []):
        found = lookup({"candidate": torch.tensor(items, dtype=torch.int64)})
        assert found["candidate"].rows.shape == (len(items), 3)


def test_gradients_reach_the_attributes_of_all_features_and_requests():
    requests = [{"history": torch.tensor([3, 0])}, {"candidate": torch.tensor([2, 1])}]
    merged = merge_ids(SPECS, requests)
    assert (
        merged.tables["item_attributes"].tolist() == [10, 11, 12, 13]
        and "user_attributes" not in merged.tables
    )
    leaves = {name: torch.zeros(len(ids), 3, requires_grad=True) for name, ids in merged.tables.items()}
    for request, positions in zip(requests, merged.positions, strict=True):
        for found in rows_of_request(SPECS, leaves, request, positions, {}).values():
            (found.rows * (1 + found.ids[:, None])).sum().backward()
    # Item 0 counts once, 2 three times, 3 four times.
    assert leaves["item_attributes"].grad[:, 0].tolist() == [1 + 3, 1 + 4, 4, 4]
    assert leaves["item"].grad[:, 0].tolist() == [1, 2, 3, 4]


def test_what_attributes_are_asked_for_costs_nothing_of_the_size_of_the_catalogue(monkeypatch):
    """Lengths of all rows were worked out in every step, half a second for 20 million items."""
    monkeypatch.setattr(Jagged, "lengths", property(lambda _: pytest.fail("read all rows")))
    found = merge_ids(SPECS, [{"history": torch.tensor([2, 3])}])
    assert found.tables["item_attributes"].tolist() == [10, 11, 12, 13]
    assert found.positions[0]["history bags"].tolist() == [0, 1, 4]
