"""All splits against a user-by-user reference."""

import numpy as np
import pytest

from cluster.errors import DataError
from data_streams.splits import SplitRule, by_session, by_time, leave_last_out, leave_one_out


def random_users(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, 60)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    times = np.concatenate([np.sort(rng.integers(0, 100, length)) for length in lengths]).astype(np.int64)
    return offsets, rng.random(offsets[-1]) < 0.7, times


@pytest.mark.parametrize("seed", range(5))
def test_leave_last_out_holds_out_the_last_two_positive_events(seed):
    offsets, positive, _ = random_users(seed)
    split = leave_last_out(offsets, positive)
    for user in range(len(offsets) - 1):
        mine = np.flatnonzero(positive[offsets[user] : offsets[user + 1]])
        length = offsets[user + 1] - offsets[user]
        expected = (mine[-2], mine[-2], mine[-1]) if len(mine) >= 3 else (length, -1, -1)
        assert (split.train_end[user], split.valid_at[user], split.test_at[user]) == expected


@pytest.mark.parametrize("seed", range(5))
def test_by_time_trains_before_and_holds_out_the_first_positive_event_of_each_period(seed):
    offsets, positive, times = random_users(seed)
    split = by_time(offsets, positive, times, valid_from_s=50, test_from_s=80)
    for user in range(len(offsets) - 1):
        span = slice(offsets[user], offsets[user + 1])
        early, mine, at = times[span] < 50, positive[span], times[span]
        valid = np.flatnonzero(mine & (at >= 50) & (at < 80))
        test = np.flatnonzero(mine & (at >= 80))
        assert split.train_end[user] == early.sum()
        assert split.valid_at[user] == (valid[0] if len(valid) else -1)
        assert split.test_at[user] == (test[0] if len(test) else -1)


def test_a_user_with_two_events_only_trains():
    split = leave_last_out(np.array([0, 2, 5]), np.ones(5, dtype=bool))
    assert split.train_end.tolist() == [2, 1]
    assert split.valid_at.tolist() == [-1, 1]
    assert split.test_at.tolist() == [-1, 2]


def test_a_split_by_time_without_times_says_what_to_do():
    rule = SplitRule(name="by-time", valid_from_s=1, test_from_s=2)
    with pytest.raises(DataError, match="needs events with timestamp_s; say --split leave-last-out"):
        rule.apply(np.array([0, 1]), np.array([True]), None)


@pytest.mark.parametrize("seed", range(5))
def test_leave_one_out_holds_out_the_last_positive_event_for_both(seed):
    offsets, positive, _ = random_users(seed)
    split = leave_one_out(offsets, positive)
    for user in range(len(offsets) - 1):
        mine = np.flatnonzero(positive[offsets[user] : offsets[user + 1]])
        length = offsets[user + 1] - offsets[user]
        expected = (mine[-1], mine[-1], mine[-1]) if len(mine) >= 2 else (length, -1, -1)
        assert (split.train_end[user], split.valid_at[user], split.test_at[user]) == expected


@pytest.mark.parametrize("seed", range(5))
def test_by_session_gives_whole_users_to_the_period_in_which_they_end(seed):
    offsets, positive, times = random_users(seed)
    split = by_session(offsets, positive, times, valid_from_s=60, test_from_s=90)
    for user in range(len(offsets) - 1):
        mine = np.flatnonzero(positive[offsets[user] : offsets[user + 1]])
        length = offsets[user + 1] - offsets[user]
        end = times[offsets[user + 1] - 1] if length else 0
        held = mine[-1] if len(mine) >= 2 else -1
        expected = (length, -1, -1) if end < 60 else (0, held, -1) if end < 90 else (0, -1, held)
        assert (split.train_end[user], split.valid_at[user], split.test_at[user]) == expected
