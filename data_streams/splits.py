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

MIN_EVENTS_TO_HOLD_OUT = 3
"""With fewer events nothing would be left to train on."""


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

    name: Literal["leave-last-out", "by-time"] = "leave-last-out"
    valid_from_s: int | None = None
    test_from_s: int | None = None

    def apply(self, offsets: np.ndarray, positive: np.ndarray, timestamp_s: np.ndarray | None) -> Split:
        """Raises: DataError when a split by time meets events without times."""
        if self.name == "leave-last-out":
            return leave_last_out(offsets, positive)
        if timestamp_s is None:
            raise DataError("the split by-time needs events with timestamp_s; say --split leave-last-out")
        return by_time(
            offsets, positive, timestamp_s, valid_from_s=self.valid_from_s, test_from_s=self.test_from_s
        )


def leave_last_out(offsets: np.ndarray, positive: np.ndarray) -> Split:
    """The last positive event is the test, the last but one the validation; with fewer than 3, all train."""
    upto = np.concatenate([[0], np.cumsum(positive)])
    later = np.repeat(upto[offsets[1:]], np.diff(offsets)) - upto[1:]
    test_at = _first_where(offsets, positive & (later == 0))
    valid_at = _first_where(offsets, positive & (later == 1))
    held_out = upto[offsets[1:]] - upto[offsets[:-1]] >= MIN_EVENTS_TO_HOLD_OUT
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
