"""Where validation and test begin when a build is told days or shares, against sorting all events."""

import numpy as np
import polars as pl
import pytest

from cluster.errors import ConfigError, DataError
from tests.data_streams.test_build import build_events


def events_over(seconds, seed=0, num_events=500):
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user_id": rng.integers(0, 30, num_events),
            "item_id": rng.integers(0, 10, num_events),
            "timestamp": 1_000_000 + rng.integers(0, seconds, num_events),
        }
    )


@pytest.mark.parametrize("seconds", [50, 5_000, 10_000_000])
def test_shares_are_the_times_of_the_events_at_those_places(tmp_path, seconds):
    events = events_over(seconds)
    manifest = build_events(tmp_path, events, split="by-time", train_share=0.8, valid_share=0.1, partitions=4)
    times = events["timestamp"].sort()
    assert manifest.split == {"name": "by-time", "valid_from_s": times[400], "test_from_s": times[450]}


def test_shares_that_add_up_to_a_bit_too_much_hold_no_event_more(tmp_path):
    events = pl.DataFrame({"user_id": [1] * 10, "item_id": [1] * 10, "timestamp": range(10)})
    manifest = build_events(tmp_path, events, split="by-time", train_share=0.1, valid_share=0.2)
    assert (manifest.split["valid_from_s"], manifest.split["test_from_s"]) == (1, 3)


def test_shares_are_of_the_events_that_are_left(tmp_path):
    events = events_over(10_000)
    few = pl.DataFrame({"user_id": [99], "item_id": [1], "timestamp": [5_000_000]})
    options = {"split": "by-time", "train_share": 0.8, "valid_share": 0.1, "min_user_events": 2}
    manifest = build_events(tmp_path, pl.concat([events, few]), **options)
    assert manifest.split["valid_from_s"] == events["timestamp"].sort()[400]


def test_days_are_counted_back_from_the_last_event(tmp_path):
    events = events_over(5 * 86_400)
    manifest = build_events(tmp_path, events, split="by-session", valid_days=0.5, test_days=1, partitions=3)
    last = events["timestamp"].max()
    assert manifest.split == {
        "name": "by-session",
        "valid_from_s": last - 129_600,
        "test_from_s": last - 86_400,
    }


def test_days_and_shares_need_times(tmp_path):
    events = pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "pos": [0, 1]})
    for options in ({"valid_days": 1, "test_days": 1}, {"train_share": 0.5, "valid_share": 0.2}):
        with pytest.raises(DataError, match="needs events with timestamp_s; say --split leave-last-out"):
            build_events(tmp_path, events, source={"order_column": "pos"}, split="by-time", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "by-time"}, "--split by-time needs --valid-from-s .* given none of them"),
        ({"split": "by-session", "test_days": 1}, r"needs .*; given --valid-days None, --test-days 1"),
        (
            {"valid_days": 1, "test_days": 1},
            "belong to --split by-time and by-session, given --split leave-last",
        ),
        (
            {"split": "by-time", "valid_days": 1, "test_days": 1, "train_share": 0.5, "valid_share": 0.1},
            "needs .* or .*; given --valid-days 1, --test-days 1, --train-share 0.5",
        ),
        ({"split": "by-time", "train_share": 0.9, "valid_share": 0.1}, "must lie between training and test"),
        ({"split": "by-time", "valid_days": 1, "test_days": 0}, "must lie between training and test"),
    ],
)
def test_moments_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        build_events(tmp_path, events_over(100), **options)
