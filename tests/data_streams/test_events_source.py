"""Reading tables a person has at hand: columns, types, ids, titles, embeddings, and what is wrong."""

from datetime import time

import numpy as np
import polars as pl
import pytest

from cluster.errors import DataError
from data_streams import schema
from data_streams.build import BuildConfig, build
from data_streams.sources import events as events_module
from data_streams.sources.events import EventsSource

EVENTS = {"user_id": [1, 1, 2], "item_id": [10, 11, 10], "timestamp": [5, 6, 7]}


def write(folder, frame, name="events.parquet"):
    path = str(folder / name)
    frame = pl.DataFrame(frame)
    if name.endswith(".parquet"):
        frame.write_parquet(path)
    else:
        frame.write_csv(path, separator="\t" if name.endswith(".tsv") else ",")
    return path


def read(source):
    return pl.concat([batch for part in source.parts() for batch in source.read(part)])


def source_of(folder, frame, name="events.parquet", **options):
    return EventsSource.Config(events=(write(folder, frame, name),), **options).build()


def test_parquet_and_csv_and_tsv_hold_the_same_events(tmp_path):
    tables = [read(source_of(tmp_path, EVENTS, name)) for name in ("a.parquet", "a.csv", "a.tsv")]
    for table in tables:
        assert table["timestamp_s"].to_list() == [5, 6, 7]
        assert table["action"].to_list() == ["click"] * 3
        assert table["item_id"].cast(pl.String).to_list() == ["10", "11", "10"]


def test_columns_are_mapped_by_name(tmp_path):
    frame = {"who": [1], "what": ["x"], "at": [9_000], "did": ["buy"], "slot": [3], "request": ["r1"]}
    source = source_of(
        tmp_path,
        frame,
        user_column="who",
        item_column="what",
        timestamp_column="at",
        time_unit="ms",
        action_column="did",
        position_column="slot",
        page_column="request",
    )
    row = read(source).row(0, named=True)
    expected = {
        "user_id": 1,
        "item_id": "x",
        "timestamp_s": 9,
        "action": "buy",
        "position": 3,
        "page_id": "r1",
    }
    assert row == expected


def test_times_may_be_dates_and_text(tmp_path):
    stamps = pl.Series(["2020-01-01 00:00:10", "2020-01-01T00:00:20"])
    seconds = [1577836810, 1577836820]
    text = source_of(tmp_path, {"user_id": [1, 2], "item_id": [1, 2], "timestamp": stamps}, "a.csv")
    dates = source_of(
        tmp_path,
        {"user_id": [1, 2], "item_id": [1, 2], "timestamp": stamps.str.replace("T", " ").str.to_datetime()},
    )
    assert read(text)["timestamp_s"].to_list() == seconds
    assert read(dates)["timestamp_s"].to_list() == seconds


def test_offsets_from_utc_are_taken_off_the_times(tmp_path):
    stamps = {
        "2020-01-01T00:00:10Z": 1577836810,
        "2020-01-01T00:00:10.250Z": 1577836810,
        "2020-01-01 00:00:10.250": 1577836810,
        "2020-01-01T02:30:10+02:30": 1577836810,
        "2020-01-01 02:30:10.5+0230": 1577836810,
        "2019-12-31T16:00:10-08": 1577836810,
        "2019-12-31T20:30:10-0330": 1577836810,
        "2020-01-01 00:00:10 UTC": 1577836810,
        "2020-01-01 00:00:10,500 gmt": 1577836810,
        "2020-01-01 01:00:10.000000 +0100": 1577836810,
    }
    count = len(stamps)
    source = source_of(
        tmp_path, {"user_id": [1] * count, "item_id": [1] * count, "timestamp": list(stamps)}, "a.csv"
    )
    assert read(source)["timestamp_s"].to_list() == list(stamps.values())


def test_times_with_an_unknown_rest_are_no_times(tmp_path):
    stamps = [
        "2020-01-01T00:00:10 CET",
        "2020-01-01T00:00:10+25:00",
        "2020-01-01T00:00:10+2",
        "2020-01-01T00:00:10 PM",
        "2020-01-01T00:00:100",
    ]
    count = len(stamps)
    source = source_of(
        tmp_path, {"user_id": [1] * count, "item_id": [1] * count, "timestamp": stamps}, "a.csv"
    )
    events = read(source)
    assert events["timestamp_s"].to_list() == [None] * count
    assert schema.bad_rows(events)["events without timestamp_s"].sum() == count


def test_large_files_are_read_in_parts_that_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(events_module, "PART_ROWS", 30)
    monkeypatch.setattr(events_module, "BATCH_ROWS", 7)
    frame = {"user_id": np.arange(100), "item_id": np.arange(100), "timestamp": np.arange(100)}
    source = source_of(tmp_path, frame)
    assert len(source.parts()) == 4
    assert read(source)["item_id"].to_list() == list(range(100))


def test_a_glob_names_several_files_in_order(tmp_path):
    for number in (2, 1):
        write(tmp_path, {"user_id": [number], "item_id": [1], "timestamp": [1]}, f"day{number}.parquet")
    source = EventsSource.Config(events=(str(tmp_path / "day*.parquet"),)).build()
    assert read(source)["user_id"].to_list() == [1, 2]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    write(tmp_path, {**EVENTS, "user_id": [7, 7, 7]}, "log1.csv")
    for name in ("log[1].csv", "log[1].parquet"):
        assert read(source_of(tmp_path, EVENTS, name))["item_id"].to_list() in (
            ["10", "11", "10"],
            [10, 11, 10],
        )


def test_titles_are_unescaped_and_categories_laid_flat(tmp_path):
    items = {
        "item_id": [1, 2, 3],
        "title": ["Soap &amp; Towel &quot;A&quot;", "", None],
        "categories": [[["Care", "Soap &amp; Co"], ["Care", "Gifts"]], [], None],
        "price": [1.0, 2.0, 3.0],
    }
    items = pl.DataFrame(items, schema_overrides={"categories": pl.List(pl.List(pl.String))})
    table = source_of(tmp_path, EVENTS, items=write(tmp_path, items, "items.parquet")).items()
    assert table.columns == ["item_id", "title", "categories", "price"]
    assert table["title"].to_list() == ['Soap & Towel "A"', "2", "3"]
    assert table["categories"].to_list() == [["Care", "Soap & Co", "Gifts"], [], []]


def test_categories_of_a_text_file_are_separated_by_bars(tmp_path):
    items = write(tmp_path, {"item_id": [1], "name": ["Kettle"], "kinds": ["Kitchen|Kettles"]}, "items.csv")
    source = source_of(tmp_path, EVENTS, items=items, title_column="name", categories_column="kinds")
    assert source.items().rows() == [("1", "Kettle", ["Kitchen", "Kettles"])]


def test_an_item_table_without_titles_calls_items_by_their_ids(tmp_path):
    source = source_of(tmp_path, EVENTS, items=write(tmp_path, {"item_id": [7]}, "items.parquet"))
    assert source.items().rows() == [(7, "7", [])]


def broken(tmp_path, message, frame=EVENTS, name="events.parquet", **options):
    with pytest.raises(DataError, match=message):
        source = source_of(tmp_path, frame, name, **options)
        read(source)
        source.items()
        source.users()
        source.embeddings()


def test_a_missing_column_names_what_is_there_and_the_option(tmp_path):
    frame = {"user": [1], "item_id": [1], "timestamp": [1]}
    broken(
        tmp_path,
        "must have a column 'user_id' that says who acted; its columns are user, item_id, timestamp; "
        "say which of them it is with --user-column NAME",
        frame,
    )
    broken(tmp_path, "must have a column 'who'.*--user-column", EVENTS, user_column="who")
    broken(tmp_path, "must have the column 'rank'; their columns are user_id", EVENTS, order_column="rank")


def test_events_without_times_and_order_are_refused(tmp_path):
    frame = {"user_id": [1], "item_id": [1]}
    broken(tmp_path, "must have times .* give --timestamp-column NAME or --order-column NAME", frame)


def test_times_that_are_not_seconds_are_refused(tmp_path):
    frame = {**EVENTS, "timestamp": [1_700_000_000_000] * 3}
    broken(tmp_path, "times must be in seconds .* holds 1700000000000; say --time-unit ms", frame)


def test_times_of_nanoseconds_are_read(tmp_path):
    times = [1_700_000_000_999_999_999, 1_700_000_001_000_000_000, 5]
    for name, written in (("a.parquet", times), ("a.csv", list(map(str, times)))):
        source = source_of(tmp_path, {**EVENTS, "timestamp": written}, name, time_unit="ns")
        assert read(source)["timestamp_s"].to_list() == [1_700_000_000, 1_700_000_001, 0]
    broken(tmp_path, "say --time-unit ms, us or ns", {**EVENTS, "timestamp": times}, time_unit="us")


def test_fractional_ids_are_refused(tmp_path):
    broken(tmp_path, "ids must be integers or text, given Float64", {**EVENTS, "item_id": [1.0, 2.0, 3.0]})


def test_an_unknown_file_type_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "events.json").write_text("{}")
    with pytest.raises(DataError, match=r"must be a \.parquet, \.csv or \.tsv file .*, given .*events\.json"):
        EventsSource.Config(events=(str(tmp_path / "events.json"),)).build()
    with pytest.raises(DataError, match=r"nothing is at .*nowhere\.parquet; check --events"):
        EventsSource.Config(events=(str(tmp_path / "nowhere.parquet"),)).build()


def test_a_damaged_file_is_refused_by_its_name(tmp_path):
    (tmp_path / "events.parquet").write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(DataError, match=r"events\.parquet cannot be read"):
        EventsSource.Config(events=(str(tmp_path / "events.parquet"),)).build().parts()


def test_repeated_and_missing_item_ids_are_refused(tmp_path):
    twice = write(tmp_path, {"item_id": [1, 2, 1]}, "twice.parquet")
    broken(tmp_path, "one row per id; 1 ids occur more than once, such as 1", items=twice)
    null = write(tmp_path, {"item_id": [1, None]}, "null.parquet")
    broken(tmp_path, "must name every row by an id; 1 rows have none", items=null)
    unnamed = write(tmp_path, {"sku": [1]}, "unnamed.parquet")
    broken(tmp_path, "must have a column 'item_id'; its columns are sku.*--item-column", items=unnamed)


def test_titles_that_are_lists_are_refused(tmp_path):
    lists = write(tmp_path, {"item_id": [1], "title": [["a", "b"]]}, "lists.parquet")
    broken(tmp_path, r"titles must be text, given List\(String\).*--title-column", items=lists)


def test_repeated_user_ids_are_refused(tmp_path):
    users = write(tmp_path, {"user_id": [1, 1], "age": [3, 4]}, "users.parquet")
    broken(tmp_path, "the user table .* must have one row per id", users=users)


def test_bad_embeddings_are_refused(tmp_path):
    items = write(tmp_path, {"item_id": [10, 11]}, "items.parquet")
    path = str(tmp_path / "vectors.npy")
    np.save(path, np.array([[1.0, 2.0], [np.nan, 1.0]], dtype=np.float32))
    broken(tmp_path, "must hold finite numbers, but row 1 has NaN", items=items, embeddings=path)
    np.save(path, np.arange(4))
    broken(
        tmp_path,
        r"must be a matrix of floats \[items, dim\], given int64 \(4,\)",
        items=items,
        embeddings=path,
    )
    np.save(path, np.zeros((2, 0), dtype=np.float32))
    broken(tmp_path, "must be a matrix of floats", items=items, embeddings=path)
    (tmp_path / "vectors.npy").write_bytes(b"x")
    broken(tmp_path, "are not a plain NumPy array", items=items, embeddings=path)
    broken(tmp_path, "need an item table .* give --items", embeddings=path)
    broken(tmp_path, r"must be an existing \.npy file", items=items, embeddings=str(tmp_path / "none.npy"))


def test_feature_columns_must_hold_whole_numbers(tmp_path):
    frame = {**EVENTS, "level": [1, None, 3], "price": [0.5, 1.0, 2.0]}
    assert read(source_of(tmp_path, frame, feature_columns=("level",)))["level"].to_list() == [1, None, 3]
    broken(tmp_path, "'price' must hold whole numbers", frame, feature_columns=("price",))


def test_whole_numbers_of_text_may_have_a_point_and_others_are_refused(tmp_path):
    """A table with gaps is written with 3.0 for 3; a name or 3.5 would all become one missing value."""
    frame = {**EVENTS, "level": ["1.0", None, " 3"], "position": ["2.0", "nan", "0"]}
    events = read(source_of(tmp_path, frame, "events.csv", feature_columns=("level",)))
    assert events["level"].to_list() == [1, None, 3] and events["position"].to_list() == [2, None, 0]
    for value in ("red", "3.5"):
        named = {**EVENTS, "level": ["1", value, "2"]}
        message = f"'level' must hold whole numbers .* given '{value}'; encode it first"
        broken(tmp_path, message, named, "events.csv", feature_columns=("level",))


def test_seconds_that_are_no_numbers_are_missing(tmp_path):
    """Of infinity a model's bucket would be one below all others, which ends the training."""
    for values, name in (([float("nan"), float("inf"), 2.5], "a.parquet"), (["x", "1e60", "2.5"], "a.csv")):
        events = read(source_of(tmp_path, {**EVENTS, "play_time_s": values}, name))
        assert events["play_time_s"].to_list() == [None, None, 2.5]


def test_feature_columns_cannot_take_the_place_of_others(tmp_path):
    frame = {**EVENTS, "item": [0, 0, 0], "offsets": [1, 1, 1], "position": [0, 1, 0]}
    for names in (("item",), ("offsets",), ("position",), ("item", "item")):
        broken(tmp_path, f"{names[0]} cannot be one of {', '.join(names)}", frame, feature_columns=names)


def test_a_file_that_two_patterns_name_is_read_once(tmp_path):
    path = write(tmp_path, EVENTS)
    source = EventsSource.Config(events=(path, f"{tmp_path}/*.parquet")).build()
    assert read(source)["timestamp_s"].to_list() == EVENTS["timestamp"]


def test_ids_that_are_numbers_in_one_file_and_text_in_another_are_refused(tmp_path):
    files = tuple(write(tmp_path, EVENTS, name) for name in ("a.parquet", "b.csv"))
    with pytest.raises(DataError, match=r"item_id must be of one type in all files .* is Int64 and String"):
        build(EventsSource.Config(events=files), BuildConfig(out=str(tmp_path / "out"), ray="never"))


def test_times_without_a_day_and_orders_that_are_no_numbers_are_refused(tmp_path):
    broken(tmp_path, "must be dates, numbers or text, given Time", {**EVENTS, "timestamp": [time(8)] * 3})
    frame = {**EVENTS, "place": [1.0, float("nan"), 2.0]}
    assert read(source_of(tmp_path, frame, order_column="place"))["order"].to_list() == [1.0, None, 2.0]


def test_categories_may_be_lists_of_equal_length(tmp_path):
    pairs = pl.Series([["x", "y"], ["z", "z"]], dtype=pl.Array(pl.String, 2))
    items = write(tmp_path, {"item_id": [10, 11], "categories": pairs}, "items.parquet")
    assert source_of(tmp_path, EVENTS, items=items).items()["categories"].to_list() == [["x", "y"], ["z"]]


def test_more_actions_than_codes_are_refused(tmp_path):
    events = {"user_id": [1] * 129, "item_id": range(129), "timestamp": range(129)}
    path = write(tmp_path, {**events, "action": [f"a{row:03d}" for row in range(129)]})
    with pytest.raises(DataError, match="can have 128 actions, and there are 129, such as a000, a001, a002"):
        build(EventsSource.Config(events=(path,)), BuildConfig(out=str(tmp_path / "out"), ray="never"))


def test_files_of_other_columns_would_make_chunks_that_lack_some(tmp_path):
    files = (write(tmp_path, {**EVENTS, "position": [0, 1, 0]}), write(tmp_path, EVENTS, "more.parquet"))
    with pytest.raises(DataError, match=r"position must be of one type in all files .* is Int32 and missing"):
        build(EventsSource.Config(events=files), BuildConfig(out=str(tmp_path / "out"), ray="never"))


def test_profiles_that_become_one_user_as_numbers_do_not_shift_the_user_table(tmp_path):
    users = tmp_path / "users.csv"
    users.write_text("user_id,age\n1,30\n01,40\n2,50\n")
    config = EventsSource.Config(events=(write(tmp_path, EVENTS),), users=str(users))
    build(config, BuildConfig(out=str(tmp_path / "out"), ray="never"))
    table = pl.read_parquet(tmp_path / "out/users.parquet").sort("user_id")
    assert table.rows() == [(1, "30"), (2, "50")]
