"""EB-NeRD: whole pages and the clicks before them."""

import polars as pl

from data_streams.build import BuildConfig, build
from data_streams.sources.ebnerd import EbnerdSource
from tests.data_streams.official_files import read
from tests.data_streams.test_build import read_users


def ebnerd(folder):
    (folder / "train").mkdir(parents=True)
    times = pl.Series(["2023-05-18 10:00:00", "2023-05-18 11:00:00"]).str.to_datetime(time_unit="us")
    behaviors = pl.DataFrame(
        {
            "impression_id": [7, 8],
            "article_id": [None, 30],
            "impression_time": times,
            "device_type": [1, 2],
            "article_ids_inview": [[3, 1, 2], [2, 4]],
            "article_ids_clicked": [[1], [4]],
            "user_id": [50, 50],
            "age": [40, 40],
            "session_id": [5, 6],
            "next_read_time": [12.5, None],
        },
        schema_overrides={"article_id": pl.Int32, "user_id": pl.UInt32},
    )
    behaviors.write_parquet(folder / "train/behaviors.parquet")
    pl.DataFrame(
        {
            "user_id": [50],
            "impression_time_fixed": [pl.Series(["2023-05-01 08:00:00"]).str.to_datetime()],
            "article_id_fixed": [[9]],
            "read_time_fixed": [[30.0]],
        }
    ).write_parquet(folder / "train/history.parquet")
    pl.DataFrame(
        {
            "article_id": [1, 2, 3, 4],
            "title": list("abcd"),
            "category_str": ["sport"] * 4,
            "topics": [["Bold"]] * 4,
            "body": ["x"] * 4,
        }
    ).write_parquet(folder / "articles.parquet")
    return str(folder)


def test_ebnerd_impressions_are_pages_of_exposures_and_clicks(tmp_path):
    config = EbnerdSource.Config(path=ebnerd(tmp_path / "raw"))
    build(config, BuildConfig(out=str(tmp_path / "out"), ray="never", keep_exposures=True))
    user = read_users(tmp_path / "out")[50]
    assert user["items"] == [9, 3, 1, 2, 1, 2, 4, 4]
    assert user["page_id"] == [-1, 0, 0, 0, 0, 1, 1, 1]
    assert user["position"] == [-1, 0, 1, 2, 1, 0, 1, 1]
    assert user["play_time_s"] == [30.0, 0.0, 0.0, 0.0, 12.5, 0.0, 0.0, -1.0]
    assert user["page_article"] == [-1, -1, -1, -1, -1, 30, 30, 30]
    items = pl.read_parquet(tmp_path / "out/items.parquet")
    assert items["item_id"].to_list() == [1, 2, 3, 4, 9] and items["title"].to_list() == [*"abcd", "9"]
    assert items["categories"].to_list()[0] == ["sport", "Bold"]
    assert pl.read_parquet(tmp_path / "out/users.parquet")["age"].to_list() == [40]
    bare = read(EbnerdSource.Config(path=config.path, history=False).build())
    assert bare.height == 7 and bare["page_id"].null_count() == 0


def history(clicks):
    """Rows of a history file with one click for each (user, article)."""
    times = pl.Series(["2023-05-01 08:00:00"]).str.to_datetime()
    return pl.DataFrame(
        {
            "user_id": [user for user, _ in clicks],
            "impression_time_fixed": [times] * len(clicks),
            "article_id_fixed": [[article] for _, article in clicks],
            "read_time_fixed": [[30.0]] * len(clicks),
        },
        schema_overrides={"user_id": pl.UInt32},
    )


def test_users_of_the_ebnerd_validation_alone_keep_the_clicks_before_it(tmp_path):
    folder = tmp_path / "raw"
    config = EbnerdSource.Config(path=ebnerd(folder))
    for name in ("validation", "test"):
        (folder / name).mkdir()
    behaviors = pl.read_parquet(folder / "train/behaviors.parquet")
    later = pl.col("impression_time") + pl.duration(days=7)
    behaviors.with_columns(later, pl.col("impression_id", "user_id") + 10).write_parquet(
        folder / "validation/behaviors.parquet"
    )
    # User 50 is in both histories: that of validation repeats what is known from train.
    history([(50, 9), (50, 1), (60, 5), (60, 6)]).write_parquet(
        folder / "validation/history.parquet", row_group_size=2
    )
    history([(70, 7)]).write_parquet(folder / "test/history.parquet")
    build(config, BuildConfig(out=str(tmp_path / "out"), ray="never"))
    users = read_users(tmp_path / "out")
    assert {user: row["items"] for user, row in users.items()} == {50: [9, 1, 4], 60: [5, 6, 1, 4]}


def test_a_lone_ebnerd_history_is_read_whole(tmp_path):
    folder = tmp_path / "raw"
    config = EbnerdSource.Config(path=ebnerd(folder))
    for name in ("behaviors", "history"):
        (folder / f"train/{name}.parquet").rename(folder / f"{name}.parquet")
    build(config, BuildConfig(out=str(tmp_path / "out"), ray="never"))
    assert read_users(tmp_path / "out")[50]["items"] == [9, 1, 4]


def test_the_ebnerd_fixture_keeps_its_pages(shared_data, tmp_path):
    config = EbnerdSource.Config(path=str(shared_data / "ebnerd_fixture"))
    events = read(config.build())
    counts = dict(events["action"].value_counts().iter_rows())
    assert counts == {"exposure": 10_848, "click": 1_047 + 8_303}
    assert events["page_id"].n_unique() == 1_046 + 1
    manifest = build(config, BuildConfig(out=str(tmp_path / "out"), ray="never", keep_exposures=True))
    assert manifest.num_events == 10_848 + 1_047 + 8_303


def test_an_article_without_topics_keeps_its_category(tmp_path):
    config = EbnerdSource.Config(path=ebnerd(tmp_path))
    articles = {
        "article_id": [1, 2],
        "title": ["a", "b"],
        "category_str": ["sport", None],
        "topics": [None, ["x"]],
    }
    pl.DataFrame(articles).write_parquet(tmp_path / "articles.parquet")
    assert config.build().items()["categories"].to_list() == [["sport"], ["x"]]
