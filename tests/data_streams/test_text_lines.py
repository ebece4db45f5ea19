"""Items and users as lines of text, from the tables of a data set."""

import polars as pl
import pytest

from cluster.errors import ConfigError
from data_streams.text_lines import item_lines, user_lines


def write(folder, **columns) -> str:
    pl.DataFrame(columns).write_parquet(folder / "items.parquet")
    return str(folder)


def test_items_are_written_with_the_columns_that_are_named_and_there(tmp_path):
    data = write(
        tmp_path, item_id=[7, 8], title=["Red polish", None], price=[4.5, 2.0], categories=[["Nails"], []]
    )
    assert item_lines(data, ("title", "brand")) == ["Title: Red polish", ""]
    assert item_lines(data, ("title", "price", "categories")) == [
        "Title: Red polish. Price: 4.5. Categories: Nails",
        "Price: 2.0",
    ]
    write(tmp_path, item_id=[7, 8], title=["Red polish", "Blue"], price=[4.5, float("nan")])
    assert item_lines(data, ("title", "price")) == ["Title: Red polish. Price: 4.5", "Title: Blue"]


def test_data_without_text_is_refused(tmp_path):
    data = write(tmp_path, item_id=["a", "b"], title=["a", "b"], categories=[["x"], None])
    with pytest.raises(ConfigError, match="must have text in title, and there is none"):
        item_lines(data, ("title",))
    with pytest.raises(ConfigError, match="must have text in brand"):
        item_lines(data, ("brand",))
    assert item_lines(data, ("title", "categories")) == ["Title: a. Categories: x", "Title: b"]
    write(tmp_path, item_id=["a", "b"], title=["a", "b"], categories=[[], []], brand=["", None])
    with pytest.raises(ConfigError, match="must have text in title, brand, categories, and there is none"):
        item_lines(data, ("title", "brand", "categories"))
    with pytest.raises(ConfigError, match="some of title, price, brand, categories, got titel"):
        item_lines(data, ("titel",))


def test_users_are_written_with_what_their_table_says_beside_the_id(tmp_path):
    assert user_lines(str(tmp_path)) is None
    pl.DataFrame({"user_id": [1, 2]}).write_parquet(tmp_path / "users.parquet")
    assert user_lines(str(tmp_path)) is None
    table = {"user_id": [1, 2], "age": [24, None], "zip_code": ["", "94043"]}
    pl.DataFrame(table).write_parquet(tmp_path / "users.parquet")
    assert user_lines(str(tmp_path)) == ["Age: 24", "Zip code: 94043"]
    table = {"user_id": [1, 2], "age": [24.5, float("nan")], "likes": [["tea", ""], []], "name": [None, " "]}
    pl.DataFrame(table).write_parquet(tmp_path / "users.parquet")
    assert user_lines(str(tmp_path)) == ["Age: 24.5. Likes: tea", ""]


def test_a_user_table_without_any_value_says_nothing(tmp_path):
    pl.DataFrame({"user_id": [1, 2], "age": [None, float("nan")]}).write_parquet(tmp_path / "users.parquet")
    assert user_lines(str(tmp_path)) is None
