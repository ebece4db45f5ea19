"""Leaving out users and items with few events, against a plain loop, in one process and in several partitions."""

import numpy as np
import polars as pl
import pytest

from cluster.errors import ConfigError, DataError
from tests.data_streams.test_build import build_events, random_events, read_users


def core_of(rows, min_user, min_item, passes=None):
    """(user, item) rows that are left."""
    number = 0
    while number != passes:
        before = len(rows)
        users = [user for user, _ in rows]
        rows = [row for row in rows if users.count(row[0]) >= min_user]
        items = [item for _, item in rows]
        rows = [row for row in rows if items.count(row[1]) >= min_item]
        number += 1
        if len(rows) == before:
            break
    users = [user for user, _ in rows]
    return [row for row in rows if users.count(row[0]) >= min_user]


def skewed_events(seed):
    rng = np.random.default_rng(seed)
    items = rng.zipf(1.5, 300) % 40
    users = rng.zipf(1.4, 300) % 50
    return pl.DataFrame({"user_id": users, "item_id": items, "timestamp": np.arange(300)})


@pytest.mark.parametrize("passes", [None, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_is_what_a_loop_leaves(tmp_path, seed, passes):
    events = skewed_events(seed)
    manifest = build_events(
        tmp_path, events, min_user_events=4, min_item_events=5, filter_passes=passes, partitions=3
    )
    users = read_users(tmp_path / "out")
    found = [(user, item) for user, values in users.items() for item in values["items"]]
    expected = core_of(events.select("user_id", "item_id").rows(), 4, 5, passes)
    assert sorted(found) == sorted(expected)
    left_out = manifest.counters["events of items with fewer than 5 events"]
    left_out += manifest.counters["events of users with fewer than 4 events"]
    assert left_out == 300 - len(expected) == 300 - manifest.num_events
    assert manifest.counters["users with fewer than 4 events"] == events["user_id"].n_unique() - len(users)
    if passes is None:
        assert set(pl.read_parquet(tmp_path / "out/items.parquet")["item_id"]) == {item for _, item in found}
        assert manifest.counters["passes over users and items"] >= 2


def test_the_catalogue_and_its_embeddings_lose_the_same_items(tmp_path):
    events = random_events(0, num_items=30, num_events=100)
    items = pl.DataFrame({"item_id": range(29, -1, -1), "title": [f"t{item}" for item in range(29, -1, -1)]})
    vectors = np.arange(60, dtype=np.float16).reshape(30, 2)
    np.save(tmp_path / "vectors.npy", vectors)
    source = {"embeddings": str(tmp_path / "vectors.npy")}
    manifest = build_events(tmp_path, events, items, source, min_item_events=4)
    counts = dict(events["item_id"].value_counts().iter_rows())
    kept = [row for row, item in enumerate(items["item_id"]) if counts.get(item, 0) >= 4]
    table = pl.read_parquet(tmp_path / "out/items.parquet")
    assert 0 < len(kept) < 30
    assert table["item_id"].to_list() == items["item_id"][kept].to_list()
    assert table["title"].to_list() == items["title"][kept].to_list()
    stored = np.load(tmp_path / "out/item_embeddings.npy", allow_pickle=False)
    assert (stored == vectors[kept]).all() and stored.dtype == np.float16
    assert manifest.num_items == len(kept) and manifest.embedding["dim"] == 2
    assert manifest.counters["items with fewer than 4 events"] == 30 - len(kept)


def test_one_event_for_an_item_leaves_out_what_nobody_chose(tmp_path):
    events = pl.DataFrame(
        {
            "user_id": [1, 1, 1],
            "item_id": [3, 5, 3],
            "timestamp": [1, 2, 3],
            "action": ["click", "exposure", "click"],
        }
    )
    items = pl.DataFrame({"item_id": [1, 3, 5]})
    build_events(tmp_path, events, items, min_item_events=1, keep_exposures=True)
    assert pl.read_parquet(tmp_path / "out/items.parquet")["item_id"].to_list() == [3]
    assert read_users(tmp_path / "out")[1]["items"] == [3, 3], "the exposure of an item goes with the item"


def test_unknown_items_are_still_refused_or_counted(tmp_path):
    events = pl.DataFrame({"user_id": [1, 1, 1], "item_id": [3, 9, 3], "timestamp": [1, 2, 3]})
    items = pl.DataFrame({"item_id": [1, 3]})
    with pytest.raises(DataError, match=r"1 events .* have unknown items, such as 9"):
        build_events(tmp_path, events, items, min_item_events=1)
    manifest = build_events(tmp_path, events, items, min_item_events=1, on_bad_row="skip")
    assert manifest.counters["events with unknown items"] == 1
    assert "events of items with fewer than 1 events" not in manifest.counters


def test_a_filter_that_leaves_nothing_says_which_option_to_lower(tmp_path):
    with pytest.raises(DataError, match=r"none of 15 is left after . passes; lower --min-item-events or"):
        build_events(tmp_path, random_events(0), min_item_events=1_000)
    with pytest.raises(ConfigError, match="--filter-passes must be at least 1, given 0"):
        build_events(tmp_path, random_events(0), min_item_events=1, filter_passes=0)
    with pytest.raises(ConfigError, match=r"--filter-passes 1 .* only --min-item-events"):
        build_events(tmp_path, random_events(0), filter_passes=1)
