"""Leaves out users and items with few events, in turn, until all that are left have enough (a k-core).

Exposures do not count. The events stay on disk: `number_events` writes for each partition the bare rows of its users
and items, and every pass reads those; in memory there is a counter for each item and, in a task, for each user.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from cluster.errors import DataError
from cluster.storage import Storage
from data_streams.partition import ITEM_INDEX, read_parquet, write_temporary

KEPT = "tmp/core/kept.npy"


@dataclass(frozen=True, kw_only=True)
class NumberTask:
    """A partition below the folder `root` whose events are to be numbered."""

    index: int
    root: str
    beside: tuple[str, ...]
    """Actions that are no part of a user's sequence."""


@dataclass(frozen=True, kw_only=True)
class Numbered:
    """What `number_events` hands on: events of known items that are part of a sequence."""

    index: int
    num_events: int


def number_events(task: NumberTask) -> Numbered:
    """Write user and item of each event of a partition as rows, without unknown items and what lies beside."""
    storage = Storage(task.root)
    folder = f"tmp/events/{task.index:05d}"
    columns = ["user_id", "item_id", "action"]
    batches = [
        pl.read_parquet(io.BytesIO(storage.read(f"{folder}/{name}")), columns=columns)
        for name in storage.list(folder)
    ]
    users, items = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32)
    if batches:
        index = read_parquet(storage, ITEM_INDEX)
        events = pl.concat(batches).filter(~pl.col("action").is_in(task.beside))
        ids = events["item_id"].cast(index.schema["item_id"], strict=False)
        events = events.with_columns(ids).join(index, on="item_id", how="inner")
        users = (events["user_id"].rank("dense") - 1).to_numpy().astype(np.int32)
        items = events["item"].to_numpy()
    _write_array(storage, _users_name(task.index), users)
    _write_array(storage, _items_name(task.index), items)
    return Numbered(index=task.index, num_events=len(items))


@dataclass(frozen=True, kw_only=True)
class CountTask:
    """One pass over a partition that `number_events` has numbered."""

    index: int
    root: str
    min_user_events: int


@dataclass(frozen=True, kw_only=True)
class ItemCounts:
    """Shapes: [I] each, for the items that occur."""

    index: int
    num_events: int
    items: np.ndarray
    counts: np.ndarray


def count_items(task: CountTask) -> ItemCounts:
    """How often users with enough events of kept items have chosen each kept item."""
    storage = Storage(task.root)
    kept = _read_array(storage, KEPT)
    users, items = (_read_array(storage, name(task.index)) for name in (_users_name, _items_name))
    users, items = users[kept[items]], items[kept[items]]
    enough = np.bincount(users) >= task.min_user_events
    items, counts = np.unique(items[enough[users]], return_counts=True)
    return ItemCounts(index=task.index, num_events=int(counts.sum()), items=items, counts=counts)


@dataclass(frozen=True, kw_only=True)
class Core:
    """Shapes: N items."""

    kept: np.ndarray
    """[N] bool, items that stay."""
    passes: int
    """How often users and items were counted."""


def find_core(
    storage: Storage,
    count: Callable[[], Iterator[ItemCounts]],
    *,
    num_items: int,
    min_item_events: int,
    max_passes: int | None,
) -> Core:
    """Count again and again, each time without what had too few events, until nothing changes.

    `count` runs `count_items` on every partition. The users' own limit is applied in each pass before the
    items', and once more by whoever uses the result.

    Raises: DataError when no item is left.
    """
    kept, passes, changed = np.ones(num_items, dtype=bool), 0, True
    while changed and passes != max_passes:
        _write_array(storage, KEPT, kept)
        totals = np.zeros(num_items, dtype=np.int64)
        for found in count():
            totals[found.items] += found.counts
        still = kept & (totals >= min_item_events)
        changed = bool((still != kept).any())
        kept, passes = still, passes + 1
    if not kept.any():
        raise DataError(
            f"a data set needs items, but none of {num_items} is left after {passes} passes; lower "
            "--min-item-events or --min-user-events"
        )
    return Core(kept=kept, passes=passes)


def _users_name(index: int) -> str:
    return f"tmp/core/{index:05d}.users.npy"


def _items_name(index: int) -> str:
    return f"tmp/core/{index:05d}.items.npy"


def _write_array(storage: Storage, name: str, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_temporary(storage, name, buffer.getvalue())


def _read_array(storage: Storage, name: str) -> np.ndarray:
    return np.load(io.BytesIO(storage.read(name)), allow_pickle=False)
