"""YooChoose: sessions, purchases, shares and the published split."""

import polars as pl
import pytest

from cluster.errors import ConfigError, DataError
from data_streams.build import BuildConfig, build
from data_streams.sources.yoochoose import YooChooseSource
from tests.data_streams.official_files import read, write
from tests.data_streams.test_build import read_users

CLICKS = "\n".join(
    f"{session},2014-04-{day:02d}T10:0{place}:27.{place}30Z,{item},{category}"
    for session, day, items in ((1, 3, "ab"), (3, 1, "abc"), (2, 2, "b"), (4, 5, "ab"), (5, 9, "cb"))
    for place, (item, category) in enumerate(zip((ord(letter) for letter in items), "S0", strict=False))
)


def test_yoochoose_sessions_are_users_with_clicks_and_purchases(tmp_path):
    folder = write(
        tmp_path,
        {"yoochoose-clicks.dat": CLICKS, "yoochoose-buys.dat": "4,2014-04-05T10:09:00.000Z,97,12462,1\n"},
    )
    source = YooChooseSource.Config(path=folder).build()
    events = read(source)
    assert events.filter(pl.col("action") == "purchase").rows(named=True)[0]["item_id"] == 97
    first = events.row(0, named=True)
    assert (first["user_id"], first["timestamp_s"], first["category"]) == (1, 1396519227, 13)
    assert source.sequence_actions() == ("click",)


def test_yoochoose_keeps_the_latest_share_of_sessions_and_the_last_day(tmp_path):
    folder = write(tmp_path, {"yoochoose-clicks.dat": CLICKS})
    kept = {
        fraction: set(read(YooChooseSource.Config(path=folder, fraction=fraction).build())["user_id"])
        for fraction in ("1", "1/2", "1/4", "0.3")
    }
    assert kept == {"1": {1, 2, 3, 4, 5}, "1/2": {1, 4, 5}, "1/4": {4, 5}, "0.3": {1, 4, 5}}
    with pytest.raises(ConfigError, match="--fraction must be a share above 0 and up to 1, such as 1/64"):
        YooChooseSource.Config(path=folder, fraction="64").build()


def test_yoochoose_is_split_by_days_as_published(tmp_path):
    folder = write(tmp_path, {"yoochoose-clicks.dat": CLICKS})
    options = {"split": "by-session", "valid_days": 4, "test_days": 1, "min_user_events": 2}
    build(YooChooseSource.Config(path=folder), BuildConfig(out=str(tmp_path / "out"), ray="never", **options))
    splits = {user: values["split"] for user, values in read_users(tmp_path / "out").items()}
    assert splits == {1: (2, -1, -1), 3: (2, -1, -1), 4: (0, 1, -1), 5: (0, -1, 1)}


def test_a_share_of_no_clicks_is_refused(tmp_path):
    folder = write(tmp_path, {"yoochoose-clicks.dat": ""})
    with pytest.raises(DataError, match=r"yoochoose-clicks\.dat must hold clicks, but is empty"):
        YooChooseSource.Config(path=folder, fraction="1/4").build()
