"""From tables to shards: order, splits, policies, and a build that leaves all or nothing."""

import gzip
import hashlib

import numpy as np
import polars as pl
import pytest

from cluster.errors import ConfigError, DataError
from cluster.storage import Storage
from data_streams.build import BuildConfig, build
from data_streams.item_table import ItemTable, item_columns
from data_streams.shards import Manifest, read_chunk
from data_streams.sources.events import EventsSource


def random_events(seed, num_users=40, num_items=15, num_events=400):
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user_id": rng.integers(0, num_users, num_events),
            "item_id": rng.integers(0, num_items, num_events),
            "timestamp": rng.integers(0, 50, num_events),
        }
    )


def build_events(folder, events, items=None, source=None, name="out", **options):
    """A data set of these frames, in this process unless asked otherwise."""
    path = folder / f"{name}-events.parquet"
    events.write_parquet(path)
    source = dict(source or {})
    if items is not None:
        items.write_parquet(folder / f"{name}-items.parquet")
        source["items"] = str(folder / f"{name}-items.parquet")
    config = EventsSource.Config(events=(str(path),), **source)
    return build(config, BuildConfig(**{"out": str(folder / name), "ray": "never", **options}))


def read_users(path):
    """Raw user id -> items, train_end, valid_at, test_at and columns."""
    storage = Storage(path)
    manifest = Manifest.load(storage)
    ids = pl.read_parquet(f"{path}/users.parquet")["user_id"]
    items = pl.read_parquet(f"{path}/items.parquet")["item_id"]
    users = {}
    for record in manifest.chunks:
        chunk = read_chunk(storage, record, manifest=manifest)
        for user in range(chunk.num_users):
            span = slice(chunk.offsets[user], chunk.offsets[user + 1])
            users[ids[int(chunk.users[user])]] = {
                "row": int(chunk.users[user]),
                "items": items[chunk.items[span].tolist()].to_list(),
                "split": (int(chunk.train_end[user]), int(chunk.valid_at[user]), int(chunk.test_at[user])),
                **{column: values[span].tolist() for column, values in chunk.columns.items()},
            }
    return users


def test_users_are_ordered_in_time_and_ties_keep_the_order_of_the_source(tmp_path):
    events = random_events(0)
    manifest = build_events(tmp_path, events)
    users = read_users(tmp_path / "out")
    expected = events.sort("timestamp", maintain_order=True)
    for user, rows in expected.group_by("user_id"):
        assert users[user[0]]["items"] == rows["item_id"].to_list()
        assert users[user[0]]["timestamp_s"] == rows["timestamp"].to_list()
    assert (manifest.num_users, manifest.num_items) == (len(users), events["item_id"].n_unique())
    assert manifest.num_events == sum(len(user["items"]) for user in users.values()) == 400


def test_an_order_column_orders_the_events_where_times_are_missing(tmp_path):
    events = pl.DataFrame({"user_id": [1, 1, 1, 1], "item_id": [4, 3, 2, 1], "pos": [2, 0, 3, 1]})
    manifest = build_events(tmp_path, events, source={"order_column": "pos"})
    assert read_users(tmp_path / "out")[1]["items"] == [3, 1, 4, 2]
    assert "timestamp_s" not in manifest.columns


def test_the_number_of_partitions_and_the_order_of_rows_change_no_user(tmp_path):
    events = random_events(1).with_columns(pl.int_range(pl.len()).alias("timestamp"))
    build_events(tmp_path, events, name="one", partitions=1)
    build_events(tmp_path, events.reverse(), name="many", partitions=7)
    assert read_users(tmp_path / "one") == read_users(tmp_path / "many")


def test_the_same_build_gives_the_same_bytes(tmp_path):
    events = random_events(2)
    first, second = (build_events(tmp_path, events, name=name, partitions=3) for name in ("a", "b"))
    assert first.fingerprint() == second.fingerprint()


def test_ray_tasks_build_the_same_data_set(tmp_path):
    import ray

    events = random_events(3).with_columns(user_id=pl.format("user-{}", "user_id"))
    here = build_events(tmp_path, events, name="here", partitions=3)
    try:
        there = build_events(tmp_path, events, name="there", partitions=3, ray="always")
    finally:
        ray.shutdown()
    assert here.chunks == there.chunks
    assert read_users(tmp_path / "here") == read_users(tmp_path / "there")


def test_train_counts_are_the_occurrences_within_training_spans(tmp_path):
    manifest = build_events(tmp_path, random_events(4), partitions=3)
    table = pl.read_parquet(tmp_path / "out" / "items.parquet")
    counts = dict.fromkeys(table["item_id"], 0)
    lengths = {}
    for user in read_users(tmp_path / "out").values():
        train_end = user["split"][0]
        lengths[train_end] = lengths.get(train_end, 0) + 1
        for item in user["items"][:train_end]:
            counts[item] += 1
    assert dict(zip(table["item_id"], table["train_count"], strict=True)) == counts
    assert manifest.train_length_counts == lengths
    stored = (tmp_path / "out" / "items.parquet").read_bytes()
    assert manifest.catalogue_sha256 == hashlib.sha256(stored).hexdigest()


def test_items_keep_the_order_of_their_table_and_embeddings_go_along(tmp_path):
    events = pl.DataFrame({"user_id": [1, 1, 1], "item_id": [30, 10, 30], "timestamp": [1, 2, 3]})
    vectors = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float16)
    np.save(tmp_path / "vectors.npy", vectors)
    items = pl.DataFrame({"item_id": [30, 20, 10], "title": ["c", "b", "a"], "price": [3, 2, 1]})
    manifest = build_events(tmp_path, events, items, source={"embeddings": str(tmp_path / "vectors.npy")})
    table = pl.read_parquet(tmp_path / "out" / "items.parquet")
    assert table.columns == ["item_id", "title", "categories", "train_count", "price"]
    assert table["item_id"].to_list() == [30, 20, 10]
    assert manifest.embedding == {"file": "item_embeddings.npy", "dim": 4, "dtype": "float16"}
    stored = np.load(tmp_path / "out" / "item_embeddings.npy", mmap_mode="r", allow_pickle=False)
    assert (stored == vectors).all()


def test_user_profiles_follow_the_rows_of_the_users(tmp_path):
    pl.DataFrame({"user_id": range(60), "age": [2 * user for user in range(60)]}).write_csv(
        tmp_path / "users.csv"
    )
    build_events(tmp_path, random_events(5), source={"users": str(tmp_path / "users.csv")}, partitions=4)
    table = pl.read_parquet(tmp_path / "out" / "users.parquet")
    assert table.height == 40
    assert table["age"].cast(pl.Int64).to_list() == [2 * user for user in table["user_id"]]


def test_by_time_holds_out_what_lies_after_two_points_in_time(tmp_path):
    events = pl.DataFrame({"user_id": [1] * 5, "item_id": [1, 2, 3, 4, 5], "timestamp": [1, 5, 6, 9, 10]})
    manifest = build_events(tmp_path, events, split="by-time", valid_from_s=5, test_from_s=9)
    assert read_users(tmp_path / "out")[1]["split"] == (1, 1, 3)
    assert manifest.split == {"name": "by-time", "valid_from_s": 5, "test_from_s": 9}


def test_long_users_are_cut_to_their_latest_events_and_short_ones_left_out(tmp_path):
    events = pl.DataFrame(
        {
            "user_id": [1] * 6 + [2] * 2 + [3] * 4,
            "item_id": [*range(6), *range(2), *range(4)],
            "timestamp": range(12),
        }
    )
    manifest = build_events(tmp_path, events, min_user_events=3, max_events_per_user=4)
    users = read_users(tmp_path / "out")
    assert {user: values["items"] for user, values in users.items()} == {1: [2, 3, 4, 5], 3: [0, 1, 2, 3]}
    assert manifest.counters["users with fewer than 3 events"] == 1
    assert manifest.counters["users cut to their latest events"] == 1
    assert manifest.counters["events cut off"] == 2


def page_events():
    return pl.DataFrame(
        {
            "user_id": [1] * 9,
            "item_id": [1, 2, 3, 2, 4, 5, 5, 6, 6],
            "timestamp": [10, 10, 10, 12, 20, 20, 22, 30, 33],
            "action": ["exposure"] * 3 + ["click"] + ["exposure"] * 2 + ["click", "exposure", "click"],
            "page_id": ["x"] * 4 + ["y"] * 3 + ["z", "z"],
            "position": [0, 1, 2, 1, 0, 1, 1, 0, 0],
        }
    )


def test_exposures_are_no_part_of_a_sequence(tmp_path):
    manifest = build_events(tmp_path, page_events())
    user = read_users(tmp_path / "out")[1]
    assert user["items"] == [2, 5, 6]
    assert user["split"] == (1, 1, 2)
    assert manifest.actions == ["click"]


def test_kept_exposures_come_with_pages_and_are_never_held_out(tmp_path):
    manifest = build_events(tmp_path, page_events(), keep_exposures=True)
    user = read_users(tmp_path / "out")[1]
    assert user["items"] == [1, 2, 3, 2, 4, 5, 5, 6, 6]
    assert user["page_id"] == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert user["position"] == [0, 1, 2, 1, 0, 1, 1, 0, 0]
    assert [manifest.actions[code] for code in user["action"]] == page_events()["action"].to_list()
    assert user["split"] == (6, 6, 8)
    assert pl.read_parquet(tmp_path / "out" / "items.parquet")["train_count"].sum() == 1


def test_only_the_asked_actions_make_up_a_sequence(tmp_path):
    events = (
        page_events()
        .with_columns(action=pl.lit("click"))
        .with_columns(
            action=pl.when(pl.int_range(pl.len()) % 2 == 0)
            .then(pl.lit("purchase"))
            .otherwise(pl.lit("click"))
        )
    )
    manifest = build_events(tmp_path, events, sequence_actions=("purchase",))
    assert read_users(tmp_path / "out")[1]["items"] == [1, 3, 4, 5, 6]
    assert manifest.counters["events of other actions"] == 4


BAD = pl.DataFrame({"user_id": [1, None, 1, 1], "item_id": [1, 2, 9, 3], "timestamp": [1, 2, 3, None]})
ITEMS = pl.DataFrame({"item_id": [1, 2, 3]})


def test_bad_rows_end_the_build_with_an_example_and_the_way_out(tmp_path):
    with pytest.raises(DataError, match=r"has 1 events without user_id .*'item_id': 2.*--on-bad-row skip"):
        build_events(tmp_path, BAD)
    with pytest.raises(DataError, match=r"in the item table; 1 events .* such as 9; .*--on-bad-row skip"):
        build_events(tmp_path, BAD.drop_nulls(), ITEMS)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name and path.is_dir()] == []


def test_bad_rows_are_counted_and_left_out_by_policy(tmp_path, caplog):
    with caplog.at_level("INFO"):
        manifest = build_events(tmp_path, BAD, ITEMS, on_bad_row="skip")
    assert read_users(tmp_path / "out")[1]["items"] == [1]
    assert manifest.counters == {
        "events read": 4,
        "events with unknown items": 1,
        "events without timestamp_s": 1,
        "events without user_id": 1,
    }
    assert "1 events with unknown items" in caplog.text


def test_an_order_that_contradicts_the_times_is_refused_or_skipped(tmp_path):
    events = pl.DataFrame(
        {"user_id": [1, 1, 1, 2], "item_id": [1, 2, 3, 1], "timestamp": [5, 4, 6, 1], "pos": [0, 1, 2, 0]}
    )
    with pytest.raises(DataError, match=r"must not contradict the times; 1 events .*'item_id': 2"):
        build_events(tmp_path, events, source={"order_column": "pos"})
    manifest = build_events(tmp_path, events, source={"order_column": "pos"}, on_bad_row="skip")
    assert read_users(tmp_path / "out")[1]["items"] == [1, 3]
    assert manifest.counters["events earlier than one before them"] == 1


def test_no_events_and_no_users_are_refused(tmp_path):
    with pytest.raises(DataError, match="a data set needs events"):
        build_events(tmp_path, random_events(0).clear())
    with pytest.raises(DataError, match=r"needs users, but none is left .*--min-user-events"):
        build_events(tmp_path, random_events(0), min_user_events=1_000)


def test_embeddings_of_another_length_are_refused(tmp_path):
    np.save(tmp_path / "vectors.npy", np.zeros((2, 4), dtype=np.float32))
    with pytest.raises(DataError, match="3 are required, 2 are given"):
        build_events(tmp_path, BAD[:1], ITEMS, source={"embeddings": str(tmp_path / "vectors.npy")})


def test_options_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="must lie between training and test, given --valid-from-s 9, --test-from-s 3"
    ):
        build_events(tmp_path, random_events(0), split="by-time", valid_from_s=9, test_from_s=3)
    with pytest.raises(
        ConfigError, match="belong to --split by-time and by-session, given --split leave-last-out"
    ):
        build_events(tmp_path, random_events(0), valid_from_s=9)
    with pytest.raises(ConfigError, match="--chunk-users must be at least 1, given 0"):
        build_events(tmp_path, random_events(0), chunk_users=0)
    with pytest.raises(ConfigError, match="say --keep-exposures"):
        build_events(tmp_path, random_events(0), sequence_actions=("exposure",))
    for beside in ({"keep_exposures": True}, {"page_actions": ("exposure",)}):
        with pytest.raises(
            ConfigError, match="--split-actions are held out of the sequence, and exposure lie beside"
        ):
            build_events(tmp_path, random_events(0), split_actions=("click", "exposure"), **beside)


def test_a_data_set_is_replaced_only_when_asked(tmp_path):
    first = build_events(tmp_path, random_events(0))
    with pytest.raises(
        ConfigError, match=r"must be new or empty, but .* holds files; name another or add --overwrite"
    ):
        build_events(tmp_path, random_events(1))
    assert Manifest.load(Storage(tmp_path / "out")) == first
    second = build_events(tmp_path, random_events(1), overwrite=True)
    assert Manifest.load(Storage(tmp_path / "out")) == second != first


def test_actions_that_no_event_has_are_told(tmp_path, caplog):
    build_events(tmp_path, random_events(0), split_actions=("click",))
    assert "no event has" not in caplog.text
    build_events(tmp_path, random_events(0), page_actions=("clck",), overwrite=True)
    assert (
        "no event has the action clck of --page-actions; the actions that were read are click" in caplog.text
    )


def test_a_split_that_holds_nothing_out_for_validation_is_told(tmp_path, caplog):
    build_events(tmp_path, random_events(0))
    assert "held out for validation" not in caplog.text
    build_events(tmp_path, random_events(0), split="by-time", valid_from_s=9, test_from_s=9, overwrite=True)
    assert "no user has an event that is held out for validation" in caplog.text


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match=r"--out must be a folder, and .*out is a file; name another one"):
        build_events(tmp_path, random_events(0), overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_interrupted_build_leaves_what_was_there(tmp_path, monkeypatch):
    first = build_events(tmp_path, random_events(0))

    def interrupt(task):
        raise KeyboardInterrupt

    monkeypatch.setattr("data_streams.partition.write_shards", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_events(tmp_path, random_events(1), overwrite=True)
    assert Manifest.load(Storage(tmp_path / "out")) == first
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out-events.parquet"}


def test_a_data_set_can_be_built_into_an_object_store(tmp_path):
    manifest = build_events(tmp_path, random_events(0), out="memory://bucket/data")
    assert Manifest.load(Storage("memory://bucket/data")) == manifest
    assert Storage("memory://bucket").list() == ["data"]
    assert Storage("memory://bucket/data").list() == [
        "items.parquet",
        "manifest.json",
        "shards",
        "users.parquet",
    ]


def test_beauty_is_built_as_it_was_published(shared_data, tmp_path):
    folder = shared_data / "amazon2014_beauty"
    config = EventsSource.Config(
        events=(str(folder / "interactions.parquet"),),
        items=str(folder / "items.parquet"),
        embeddings=str(folder / "item_emb_minilm_f16.npy"),
        order_column="pos",
    )
    manifest = build(config, BuildConfig(out=str(tmp_path / "beauty")))
    assert (manifest.num_users, manifest.num_items, manifest.num_events) == (22_363, 12_101, 198_502)
    assert min(manifest.train_length_counts) == 3
    events = pl.read_parquet(folder / "interactions.parquet").sort("user_id", "pos")
    users = read_users(tmp_path / "beauty")
    for user, rows in events.filter(pl.col("user_id") % 97 == 0).group_by("user_id"):
        assert users[user[0]]["items"] == rows["item_id"].to_list()
        assert users[user[0]]["split"] == (rows.height - 2, rows.height - 2, rows.height - 1)
    titles = pl.read_parquet(tmp_path / "beauty" / "items.parquet")["title"]
    assert not titles.str.contains("&amp;|&quot;").any()


def test_a_file_without_any_chosen_event_is_passed_over(tmp_path):
    events = pl.DataFrame(
        {"user_id": ["a"] * 4, "item_id": list("xyzx"), "timestamp": range(4), "action": "click"}
    )
    events.write_parquet(tmp_path / "first.parquet")
    events.with_columns(action=pl.lit("exposure")).write_parquet(tmp_path / "second.parquet")
    config = EventsSource.Config(events=(str(tmp_path / "*.parquet"),))
    manifest = build(config, BuildConfig(out=str(tmp_path / "out"), ray="never"))
    assert (manifest.num_users, manifest.num_events) == (1, 4)
    alone = EventsSource.Config(events=(str(tmp_path / "second.parquet"),))
    with pytest.raises(DataError, match="--sequence-actions"):
        build(alone, BuildConfig(out=str(tmp_path / "none"), ray="never"))


def test_text_may_be_gzipped_and_what_cannot_be_read_is_said_in_own_words(tmp_path):
    frame = random_events(3)
    (tmp_path / "events.csv.gz").write_bytes(gzip.compress(frame.write_csv().encode()))
    config = EventsSource.Config(events=(str(tmp_path / "events.csv.gz"),))
    assert build(config, BuildConfig(out=str(tmp_path / "out"), ray="never")).num_events == len(frame)
    for name, text in (("empty", b""), ("ragged", b"user_id,item_id,timestamp\n1,2,3\n1,2,3,4,5\n")):
        (tmp_path / f"{name}.csv").write_bytes(text)
        broken = EventsSource.Config(events=(str(tmp_path / f"{name}.csv"),))
        with pytest.raises(
            DataError, match=rf"{name}.csv cannot be read: .*as many fields in every row"
        ) as error:
            build(broken, BuildConfig(out=str(tmp_path / name), ray="never"))
        assert "truncate_ragged_lines" not in str(error.value)


def test_items_without_any_category_have_none(tmp_path):
    build_events(tmp_path, random_events(1), items=pl.DataFrame({"item_id": range(15), "title": ["t"] * 15}))
    assert ItemTable.load(str(tmp_path / "out")).categories is None
    assert "categories" in item_columns(str(tmp_path / "out"))
