"""KuaiRand: exposures, actions and reconstructed pages."""

import polars as pl
import pytest

from cluster.errors import DataError
from data_streams.build import BuildConfig, build
from data_streams.sources.kuairand import KuaiRandSource
from tests.data_streams.official_files import read, write
from tests.data_streams.test_build import read_users

LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)


def row(user, video, time_ms, click=0, like=0, long_view=0, play=0, tab=1):
    return f"{user},{video},20220408,1200,{time_ms},{click},{like},0,0,0,0,{long_view},{play},30000,0,0,0,0,{tab}\n"


def kuairand(folder):
    start = 1649400000000
    return write(
        folder,
        {
            "data/log_standard_4_08_to_4_21_pure.csv": LOG
            + row(0, 7, start + 200_000, play=500)
            + row(0, 5, start, click=1, like=1, long_view=1, play=9500)
            + row(0, 6, start + 10_000, play=1500)
            + row(0, 8, start + 201_000, click=1, play=8000, tab=4)
            + row(1, 5, start, play=100),
            "data/log_random_4_22_to_5_08_pure.csv": LOG + row(1, 9, start + 10**9),
            "data/user_features_pure.csv": "user_id,user_active_degree,register_days\n0,full_active,10\n1,UNKNOWN,2\n",
            "data/video_features_basic_pure.csv": 'video_id,author_id,video_type,tag\n5,3,NORMAL,"12,65"\n6,4,AD,\n',
        },
    )


def test_kuairand_rows_are_exposures_and_the_actions_that_answer_them(tmp_path):
    source = KuaiRandSource.Config(path=kuairand(tmp_path)).build()
    events = read(source)
    mine = events.filter((pl.col("user_id") == 0) & (pl.col("item_id") == 5))
    assert mine["action"].to_list() == ["exposure", "click", "long_view", "like"]
    assert mine["play_time_s"].to_list() == [0.0, 9.5, 0.0, 0.0]
    assert mine["duration_s"].unique().to_list() == [30.0]
    unwatched = events.filter(pl.col("item_id") == 6)
    assert unwatched.select("action", "play_time_s").rows() == [("exposure", 1.5)]
    assert events.filter(pl.col("item_id") == 8)["tab"].unique().to_list() == [4]
    assert 9 not in events["item_id"]
    assert 9 in read(KuaiRandSource.Config(path=str(tmp_path), random_exposures=True).build())["item_id"]
    assert source.items().row(0, named=True) == {
        "item_id": 5,
        "title": "5",
        "categories": ["12", "65"],
        "author_id": "3",
        "video_type": "NORMAL",
    }
    assert source.users()["user_active_degree"].to_list() == ["full_active", "UNKNOWN"]


def test_kuairand_pages_are_reconstructed_from_pauses_and_tabs(tmp_path):
    config = KuaiRandSource.Config(path=kuairand(tmp_path / "raw"))
    build(config, BuildConfig(out=str(tmp_path / "out"), ray="never", keep_exposures=True))
    user = read_users(tmp_path / "out")[0]
    assert user["items"] == [5, 5, 6, 7, 8, 8]
    assert user["page_id"] == [0, 0, 0, 1, 2, 2], "a pause of 190 s, then another tab"
    assert user["position"] == [0, 0, 1, 0, 0, 0]
    build(config, BuildConfig(out=str(tmp_path / "clicks"), ray="never"))
    clicks = read_users(tmp_path / "clicks")[0]
    assert clicks["items"] == [5, 8] and "page_id" not in clicks


def test_a_log_without_its_columns_is_refused(tmp_path):
    folder = write(tmp_path, {"log_standard_x.csv": "user_id,video_id\n1,2\n"})
    with pytest.raises(DataError, match="lacks time_ms, play_time_ms"):
        read(KuaiRandSource.Config(path=folder).build())


def test_videos_without_tags_are_refused(tmp_path):
    folder = kuairand(tmp_path)
    write(tmp_path, {"data/video_features_basic_pure.csv": "video_id,author_id\n5,3\n"})
    with pytest.raises(DataError, match="must have the columns video_id, tag; it lacks tag"):
        KuaiRandSource.Config(path=folder).build().items()


def test_a_log_that_was_saved_again_is_read_or_refused(tmp_path):
    text = LOG + row(1, 5, 1649400000000, click=1)
    folder = write(tmp_path, {"log_standard_x.csv": text.replace("\n", "\r\n").encode("utf-8-sig")})
    assert read(KuaiRandSource.Config(path=folder).build())["user_id"].to_list() == [1, 1]
    write(tmp_path, {"log_standard_x.csv": text.encode("utf-16")})
    with pytest.raises(DataError, match="must have the columns user_id, video_id"):
        read(KuaiRandSource.Config(path=folder).build())
