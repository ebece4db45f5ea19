"""Which events of a user train, and which are held out for validation and test.

Shapes: U users, T events; a user's events lie at offsets[u]..offsets[u + 1], oldest first. `positive` [T]
marks the events that can be held out (all but exposures).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.errors import DataError

NONE = -1
"""No validation or test event."""

SplitName = Literal["leave-last-out", "leave-one-out", "by-time", "by-session"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Shapes: [U] int32 each; positions count from the user's first event."""

    train_end: np.ndarray
    """Events 0..train_end (exclusive) are for training."""
    valid_at: np.ndarray
    """Event to be ranked in validation; -1 for none."""
    test_at: np.ndarray
    """Event to be ranked in the test; -1 for none."""


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """Which of the splits below, with its parameters."""

    name: SplitName = "leave-last-out"
    valid_from_s: int | None = None
    test_from_s: int | None = None

    def apply(self, offsets: np.ndarray, positive: np.ndarray, timestamp_s: np.ndarray | None) -> Split:
        """Raises: DataError when a split by time meets events without times."""
        if self.name == "leave-last-out":
            return leave_last_out(offsets, positive)
        if self.name == "leave-one-out":
            return leave_one_out(offsets, positive)
        if timestamp_s is None:
            raise DataError(
                f"the split {self.name} needs events with timestamp_s; say --split leave-last-out"
            )
        split = {"by-time": by_time, "by-session": by_session}[self.name]
        return split(
            offsets, positive, timestamp_s, valid_from_s=self.valid_from_s, test_from_s=self.test_from_s
        )


def leave_last_out(offsets: np.ndarray, positive: np.ndarray) -> Split:
    """The last positive event is the test, the last but one the validation; with fewer than 3, all train."""
    return _leave_out(offsets, positive, num_held_out=2)


def leave_one_out(offsets: np.ndarray, positive: np.ndarray) -> Split:
    """The last positive event is validation and test in one; with fewer than 2, all train.

    Source: the public code of HSTU (Zhai et al. 2024), which trains on all but the last and looks at the last
    after every epoch. A step chosen by it is chosen by the test.
    """
    return _leave_out(offsets, positive, num_held_out=1)


def _leave_out(offsets: np.ndarray, positive: np.ndarray, *, num_held_out: int) -> Split:
    """The first of the held-out events is the validation, the last the test; one event must remain."""
    upto = np.concatenate([[0], np.cumsum(positive)])
    later = np.repeat(upto[offsets[1:]], np.diff(offsets)) - upto[1:]
    test_at = _first_where(offsets, positive & (later == 0))
    valid_at = _first_where(offsets, positive & (later == num_held_out - 1))
    held_out = upto[offsets[1:]] - upto[offsets[:-1]] > num_held_out
    return _as_int32(
        np.where(held_out, valid_at, np.diff(offsets)),
        np.where(held_out, valid_at, NONE),
        np.where(held_out, test_at, NONE),
    )


def by_time(
    offsets: np.ndarray, positive: np.ndarray, timestamp_s: np.ndarray, *, valid_from_s: int, test_from_s: int
) -> Split:
    """Events before `valid_from_s` train; the first positive event of each later period is held out.

    Validation takes the first event in valid_from_s..test_from_s (exclusive), the test the first at or after
    test_from_s, so a user may have one, both or none.
    """
    lengths = np.diff(offsets)
    first_late = _first_where(offsets, timestamp_s >= valid_from_s)
    return _as_int32(
        np.where(first_late == NONE, lengths, first_late),
        _first_where(offsets, positive & (timestamp_s >= valid_from_s) & (timestamp_s < test_from_s)),
        _first_where(offsets, positive & (timestamp_s >= test_from_s)),
    )


def by_session(
    offsets: np.ndarray, positive: np.ndarray, timestamp_s: np.ndarray, *, valid_from_s: int, test_from_s: int
) -> Split:
    """Users who end before `valid_from_s` train; of later ones nothing trains, and the last event is held out.

    Made for sessions: whoever ends in valid_from_s..test_from_s (exclusive) is for validation, whoever ends at or
    after test_from_s for the test. With one positive event there is nothing to rank it by, and none is held out.

    Source: the days of GRU4Rec (Hidasi et al. 2016), which rank every event of a session but the first; here it is
    the last one.
    """
    lengths = np.diff(offsets)
    upto = np.concatenate([[0], np.cumsum(positive)])
    later = np.repeat(upto[offsets[1:]], lengths) - upto[1:]
    last = _first_where(offsets, positive & (later == 0))
    ends = np.append(timestamp_s, 0)[np.maximum(offsets[1:] - 1, 0)]
    is_test = (lengths > 0) & (ends >= test_from_s)
    is_valid = (lengths > 0) & (ends >= valid_from_s) & ~is_test
    can_rank = upto[offsets[1:]] - upto[offsets[:-1]] > 1
    return _as_int32(
        np.where(is_test | is_valid, 0, lengths),
        np.where(is_valid & can_rank, last, NONE),
        np.where(is_test & can_rank, last, NONE),
    )


def _as_int32(train_end: np.ndarray, valid_at: np.ndarray, test_at: np.ndarray) -> Split:
    return Split(
        train_end=train_end.astype(np.int32),
        valid_at=valid_at.astype(np.int32),
        test_at=test_at.astype(np.int32),
    )


def _first_where(offsets: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Position within each user of the first event that is marked, -1 where there is none."""
    marked = np.flatnonzero(mask)
    first = np.searchsorted(marked, offsets[:-1])
    inside = first < np.searchsorted(marked, offsets[1:])
    position = np.append(marked, 0)[first] - offsets[:-1]
    return np.where(inside, position, NONE)
