"""When validation and test begin, where a build is told days or shares of the events instead of moments."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import polars as pl

from cluster.errors import DataError
from cluster.storage import Storage
from data_streams import partition

DAY_S = 86_400


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Seconds since 1970."""

    valid_from_s: int
    test_from_s: int


def before_the_end(gathered: list[partition.Gathered], *, valid_days: float, test_days: float) -> Moments:
    """The last event closes the test, which lasts `test_days`; the validation lies before it.

    Example: GRU4Rec's test is what ends within 86400 seconds before the last event.
    """
    _require_times(gathered)
    last = max(part.last_time_s for part in gathered if part.num_events)
    test_from = last - round(test_days * DAY_S)
    return Moments(valid_from_s=test_from - round(valid_days * DAY_S), test_from_s=test_from)


def at_shares(
    storage: Storage, gathered: list[partition.Gathered], *, train_share: float, valid_share: float
) -> Moments:
    """The times of the events that follow these shares of all events in the order of time.

    Cost: counts by hour are at hand; the times of at most two hours are read, partition by partition.
    """
    _require_times(gathered)
    hours = Counter()
    for part in gathered:
        hours.update(part.hour_counts)
    total = sum(hours.values())
    # 0.1 + 0.2 is a bit more than 0.3, and no event more lies before it.
    shares = (train_share, round(train_share + valid_share, 12))
    places = [min(math.ceil(round(share * total, 6)), total - 1) for share in shares]
    valid_from, test_from = (_time_of(storage, gathered, hours, place) for place in places)
    return Moments(valid_from_s=valid_from, test_from_s=test_from)


def _time_of(storage: Storage, gathered: list[partition.Gathered], hours: Counter[int], place: int) -> int:
    """Time of the event at this place (from 0) among all in the order of time."""
    numbers = np.array(sorted(hours))
    upto = np.cumsum([hours[number] for number in numbers.tolist()])
    slot = int(np.searchsorted(upto, place, side="right"))
    hour, before = int(numbers[slot]), int(upto[slot - 1]) if slot else 0
    times = [
        partition.gathered_times(storage, part.index).filter(
            pl.col("timestamp_s") // partition.HOUR_S == hour
        )
        for part in gathered
        if hour in part.hour_counts
    ]
    return pl.concat(times)["timestamp_s"].sort()[place - before]


def _require_times(gathered: list[partition.Gathered]) -> None:
    if not any(part.hour_counts for part in gathered):
        raise DataError("a split by time needs events with timestamp_s; say --split leave-last-out")
