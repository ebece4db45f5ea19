import logging

import polars as pl
import pytest

from cluster.errors import ConfigError, DataError
from data_streams import item_table
from data_streams.attributes import attribute_ids, item_attributes, user_attributes
from tests.tiny_run import NUM_ITEMS, NUM_USERS, build_tiny_data


def rows_of(*columns: pl.Series) -> list[list[int]]:
    found = attribute_ids(columns, "items of x")
    return [part.tolist() for part in found.values.split(found.lengths.tolist())]


def test_equal_values_of_a_column_are_one_id_wherever_they_stand():
    tags = pl.Series("tags", [["a", "b", "a"], [], None, ["b"]])
    brand = pl.Series("brand", ["a", None, "x", "x"])
    first, second, third, fourth = rows_of(tags, brand)
    assert len(first) == 3 and len(set(first)) == 3, "tag a and brand a are two things"
    assert second == [] and len(third) == 1 and set(third) <= set(fourth)
    assert fourth[0] == first[1]
    # Other rows and columns change nothing, nor does the next Python.
    assert rows_of(brand)[0] == [first[2]] == [4305214316748181937]
    assert min(first) >= 0


def test_numbers_are_values_and_fractions_fall_into_buckets():
    assert rows_of(pl.Series("year", [1999, 2000, 1999]))[0] == rows_of(pl.Series("year", ["1999"]))[0]
    prices = rows_of(pl.Series("price", [8.0, 10.0, 100.0, -8.0, float("nan"), None, float("inf")]))
    assert prices[0] == prices[1] and prices[0] != prices[2] and prices[0] != prices[3]
    shares = rows_of(pl.Series("share", [0.2, 0.24, 0.4, 0.0, 1e-30]))
    assert shares[0] == shares[1] != shares[2] and len({*map(tuple, shares)}) == 4
    assert prices[4] == prices[5] == prices[6] == []


def test_lists_of_lists_are_lists():
    assert rows_of(pl.Series("path", [[["a", "b"], ["a"]]])) == rows_of(pl.Series("path", [["a", "b"]]))


def test_very_long_lists_are_cut_off_and_that_is_told(caplog):
    caplog.set_level(logging.WARNING)
    (found,) = rows_of(pl.Series("tags", [[str(number) for number in range(20)]]))
    assert len(found) == 16 and "4 further ones are left out" in caplog.text


def test_what_is_no_attribute_is_refused():
    with pytest.raises(ConfigError, match="the column when holds Date"):
        rows_of(pl.Series("when", ["2020-01-01"]).str.to_date())
    with pytest.raises(DataError, match="items of x have no values in brand, tags"):
        rows_of(pl.Series("brand", [None, None]), pl.Series("tags", [[], []]))


def test_attributes_are_read_from_the_tables_of_a_data_set(tmp_path):
    data = build_tiny_data(tmp_path, categories=True)
    found = item_attributes(data, ["categories"])
    assert found.num_rows == NUM_ITEMS and found.values.unique().shape == (6,)
    with pytest.raises(ConfigError, match="no column 'category'; did you mean 'categories'"):
        item_attributes(data, ["category"])
    assert user_attributes(data, ["user_id"], NUM_USERS).num_rows == NUM_USERS
    with pytest.raises(
        ConfigError, match=r"no column 'age' \(there are: user_id\); build the data with --users"
    ):
        user_attributes(data, ["age"], NUM_USERS)
    with pytest.raises(ConfigError, match=f"one row for each of 7 users.*, and it has {NUM_USERS}"):
        user_attributes(data, ["user_id"], 7)


def test_the_table_of_items_is_read_once_for_all_columns(tmp_path, monkeypatch):
    data, read = build_tiny_data(tmp_path, categories=True), []
    original = item_table._read_items
    monkeypatch.setattr(item_table, "_read_items", lambda *given: read.append(given) or original(*given))
    found = item_attributes(data, ["categories", "title"])
    assert found.lengths.tolist() == [2] * NUM_ITEMS and len(read) == 1
