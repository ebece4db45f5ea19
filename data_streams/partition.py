"""The three tasks of a build, each on a bounded share of the events: scatter, gather, write.

`scatter` reads one part of the source and spreads its events over user partitions; `gather` brings one
partition into order and cuts it; `write_shards` splits and numbers its users and writes its chunks. What they
hand on lies in Parquet files below `tmp/`, so a task returns little more than counts.

Users are placed by a hash of their id: partitions are ranges of it and users are numbered in its order, so
that a user's row depends neither on the order of the files nor on the number of partitions.
"""

import hashlib
import io
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from cluster.errors import DataError
from cluster.storage import Storage
from cluster.user_draws import STEP, mix_bits
from data_streams import schema
from data_streams.pages import PageRule
from data_streams.shards import Chunk, ChunkRecord, ShardWriter
from data_streams.sources import Part, Source
from data_streams.splits import Split, SplitRule

ITEM_INDEX = "tmp/item_index.parquet"
LEFT_OUT = -1
"""Row of an item that is left out of the catalogue."""
PROFILES = "tmp/profiles.parquet"
HOUR_S = 3_600
COLUMN_TYPES = {
    "timestamp_s": pl.Int64,
    "action": pl.Int8,
    "page_id": pl.Int32,
    "position": pl.Int32,
    "play_time_s": pl.Float32,
    "duration_s": pl.Float32,
}


@dataclass(frozen=True, kw_only=True)
class ScatterTask:
    """One part of a source, and what becomes of its events."""

    source: Source
    part: Part
    index: int
    root: str
    num_partitions: int
    actions: tuple[str, ...]
    """Actions that are kept; empty keeps all but exposures."""
    beside: tuple[str, ...]
    """Actions that are kept and are no part of a user's sequence."""
    on_bad_row: Literal["fail", "skip"]
    collect_items: bool
    """Whether the item vocabulary has to come from the events."""


@dataclass(frozen=True, kw_only=True)
class Scattered:
    """What `scatter` hands on: events that were kept, their actions, and what was counted on the way."""

    index: int
    num_events: int
    actions: frozenset[str]
    schemas: frozenset[tuple[tuple[str, str], ...]]
    """Columns and their types of the batches that hold events."""
    counters: Counter


def scatter(task: ScatterTask) -> Scattered:
    """Spread the events of one part over the partitions."""
    storage, counters, actions, schemas, num_events = Storage(task.root), Counter(), set(), set(), 0
    item_ids: list[pl.Series] = []
    for number, batch in enumerate(task.source.read(task.part)):
        counters["events read"] += batch.height
        events = _drop_bad_rows(_keep_actions(batch, task, counters), task, counters)
        num_events += events.height
        actions.update(events["action"].unique())
        if events.height:
            schemas.add(tuple((name, str(dtype)) for name, dtype in events.schema.items()))
        if task.collect_items and events.height:
            item_ids = [pl.concat([*item_ids, events["item_id"]]).unique()]
        _write_partitions(storage, events, f"{task.index:05d}-{number:05d}", task.num_partitions)
    if item_ids:
        write_parquet(
            storage, f"tmp/item_ids/{task.index:05d}.parquet", pl.DataFrame({"item_id": item_ids[0]})
        )
    kinds = {"actions": frozenset(actions), "schemas": frozenset(schemas)}
    return Scattered(index=task.index, num_events=num_events, counters=counters, **kinds)


def _keep_actions(events: pl.DataFrame, task: ScatterTask, counters: Counter) -> pl.DataFrame:
    action = pl.col("action")
    keep = action.is_in(task.actions) if task.actions else action != schema.EXPOSURE
    keep = keep | action.is_in(task.beside)
    kept = events.filter(keep)
    counters["events of other actions"] += events.height - kept.height
    return kept


def _drop_bad_rows(events: pl.DataFrame, task: ScatterTask, counters: Counter) -> pl.DataFrame:
    bad = schema.bad_rows(events)
    for reason, mask in bad.items():
        if task.on_bad_row == "fail":
            raise DataError(
                f"every event needs an id of the user and the item and a place in time; {task.part.name} has "
                f"{int(mask.sum())} {reason} that can be read, such as "
                f"{events.filter(mask).row(0, named=True)}; correct them "
                "or leave them out with --on-bad-row skip"
            )
        counters[reason] += int(mask.sum())
    return events.filter(~pl.any_horizontal(*bad.values())) if bad else events


def _write_partitions(storage: Storage, events: pl.DataFrame, name: str, num_partitions: int) -> None:
    hashed = events.with_columns(user_hash=_hash_ids(events["user_id"]))
    partition = (pl.col("user_hash") // 2**32 * num_partitions) // 2**32
    parts = hashed.with_columns(partition=partition).partition_by(
        "partition", as_dict=True, include_key=False
    )
    for (number,), rows in parts.items():
        write_parquet(storage, f"tmp/events/{number:05d}/{name}.parquet", rows)


def _hash_ids(ids: pl.Series) -> pl.Series:
    """A 64-bit hash of each id that is the same on every machine and for every version of the libraries."""
    if ids.dtype.is_integer():
        return pl.Series(mix_bits(ids.to_numpy().astype(np.uint64) + STEP), dtype=pl.UInt64)
    if ids.is_empty():
        return pl.Series([], dtype=pl.UInt64)
    distinct = ids.unique()
    hashes = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) for text in distinct]
    return ids.replace_strict(distinct, pl.Series(hashes, dtype=pl.UInt64), return_dtype=pl.UInt64)


@dataclass(frozen=True, kw_only=True)
class GatherTask:
    """One partition below the folder `root`, and how its events are cut."""

    index: int
    root: str
    actions: tuple[str, ...]
    """All actions of the data set; an event keeps the place of its action in this list."""
    beside: tuple[str, ...]
    """Those of them that are no part of a user's sequence."""
    page_rule: PageRule | None
    min_user_events: int
    min_item_events: int
    """Says why items are left out, which is decided beforehand."""
    max_events_per_user: int
    on_bad_row: Literal["fail", "skip"]


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What `gather` hands on: all that decides how the whole data set is split and numbered."""

    index: int
    num_users: int
    num_events: int
    columns: dict[str, str]
    """Event column -> NumPy dtype."""
    hour_counts: Counter[int]
    """Hour since 1970 -> events; empty without times."""
    last_time_s: int | None
    counters: Counter


def gather(task: GatherTask) -> Gathered:
    """Bring the events of one partition into order and cut them."""
    storage, counters = Storage(task.root), Counter()
    events = _read_partition(storage, task.index)
    if events is None:
        return Gathered(
            index=task.index,
            num_users=0,
            num_events=0,
            columns={},
            hour_counts=Counter(),
            last_time_s=None,
            counters=counters,
        )
    num_users = events["user_id"].n_unique()
    events = _with_item_rows(events, read_parquet(storage, ITEM_INDEX), task, counters)
    order = "order" if "order" in events.columns else "timestamp_s"
    events = events.sort("user_hash", "user_id", order, maintain_order=True)
    events = _drop_unsorted(events, task, counters)
    if task.page_rule is not None:
        events = task.page_rule.apply(events)
    events = _limit_lengths(events, task, counters)
    users = events.group_by("user_id", maintain_order=True).len("length")
    counters[f"users with fewer than {task.min_user_events} events"] += num_users - users.height
    columns = _shard_columns(events, task.actions)
    write_parquet(storage, _gathered_name(task.index), columns.with_columns(events["item"]))
    write_parquet(storage, f"tmp/users/{task.index:05d}.parquet", users)
    timed = "timestamp_s" in columns.columns and events.height
    hours = (columns["timestamp_s"] // HOUR_S).value_counts() if timed else None
    return Gathered(
        index=task.index,
        num_users=users.height,
        num_events=events.height,
        columns={name: str(columns[name].to_numpy().dtype) for name in columns.columns},
        hour_counts=Counter(dict(hours.iter_rows())) if timed else Counter(),
        last_time_s=columns["timestamp_s"].max() if timed else None,
        counters=counters,
    )


def gathered_times(storage: Storage, index: int) -> pl.DataFrame:
    """The column timestamp_s of a gathered partition."""
    return pl.read_parquet(io.BytesIO(storage.read(_gathered_name(index))), columns=["timestamp_s"])


def _gathered_name(index: int) -> str:
    return f"tmp/gathered/{index:05d}.parquet"


def _read_partition(storage: Storage, index: int) -> pl.DataFrame | None:
    folder = f"tmp/events/{index:05d}"
    batches = [read_parquet(storage, f"{folder}/{name}") for name in storage.list(folder)]
    return pl.concat(batches, how="diagonal") if batches else None


def _with_item_rows(
    events: pl.DataFrame, index: pl.DataFrame, task: GatherTask, counters: Counter
) -> pl.DataFrame:
    ids = events["item_id"].cast(index.schema["item_id"], strict=False)
    events = events.with_columns(ids).join(index, on="item_id", how="left", maintain_order="left")
    unknown = events["item"].null_count()
    if unknown and task.on_bad_row == "fail":
        example = events.filter(pl.col("item").is_null())["item_id"][0]
        raise DataError(
            f"every event's item must be in the item table; {unknown} events of users partition {task.index} "
            f"have unknown items, such as {example!r}; add them to the table or leave the events out with "
            "--on-bad-row skip"
        )
    counters["events with unknown items"] += unknown
    kept = events.filter(pl.col("item") != LEFT_OUT)
    rare = events.height - unknown - kept.height
    counters[f"events of items with fewer than {task.min_item_events} events"] += rare
    return kept


def _limit_lengths(events: pl.DataFrame, task: GatherTask, counters: Counter) -> pl.DataFrame:
    positive = (~pl.col("action").is_in(task.beside)).sum().over("user_id")
    kept = events.filter(positive >= task.min_user_events)
    counters[f"events of users with fewer than {task.min_user_events} events"] += events.height - kept.height
    from_the_end = pl.int_range(pl.len(), 0, -1).over("user_id")
    cut = kept.filter(from_the_end <= task.max_events_per_user)
    long_users = kept.group_by("user_id").len().filter(pl.col("len") > task.max_events_per_user).height
    counters["users cut to their latest events"] += long_users
    counters["events cut off"] += kept.height - cut.height
    return cut


def _shard_columns(events: pl.DataFrame, actions: tuple[str, ...]) -> pl.DataFrame:
    """The event columns as numbers; pages are numbered from 0 within each user."""
    inner = {"user_id", "user_hash", "item_id", "item", "order"}
    columns = events.drop(inner, strict=False).with_columns(
        pl.col("action").replace_strict(list(actions), list(range(len(actions))), return_dtype=pl.Int8)
    )
    if "page_id" in columns.columns:
        columns = columns.with_columns(_page_numbers(events))
    types = {name: dtype for name, dtype in COLUMN_TYPES.items() if name in columns.columns}
    return columns.with_columns(pl.all().fill_null(schema.MISSING)).cast(types)


def _page_numbers(events: pl.DataFrame) -> pl.Series:
    """Pages of each user in the order they begin, from 0."""
    begin = pl.when(pl.col("page_id").is_not_null()).then(pl.col("place").min().over("user_id", "page_id"))
    return events.with_row_index("place").select(page_id=begin.rank("dense").over("user_id") - 1).to_series()


def _drop_unsorted(events: pl.DataFrame, task: GatherTask, counters: Counter) -> pl.DataFrame:
    """An order column must not contradict the times: what is said to come later must not be earlier."""
    if not {"order", "timestamp_s"} <= set(events.columns):
        return events
    early = pl.col("timestamp_s") < pl.col("timestamp_s").cum_max().over("user_id")
    kept = events.filter(~early)
    if kept.height < events.height and task.on_bad_row == "fail":
        example = events.filter(early).select("user_id", "item_id").row(0, named=True)
        raise DataError(
            f"the order column must not contradict the times; {events.height - kept.height} events are "
            f"earlier than one before them, such as {example}; order by time (leave --order-column out) or "
            "leave these events out with --on-bad-row skip"
        )
    counters["events earlier than one before them"] += events.height - kept.height
    return kept


@dataclass(frozen=True, kw_only=True)
class WriteTask:
    """One gathered partition, and how its users are split, numbered and laid in chunks."""

    index: int
    root: str
    split: SplitRule
    positive_codes: tuple[int, ...]
    """Codes of the column `action` that can be held out."""
    first_user: int
    """Row of the partition's first user."""
    chunk_users: int


@dataclass(frozen=True, kw_only=True)
class Written:
    """What `write_shards` hands on: all that the manifest says of these chunks."""

    index: int
    num_events: int
    num_validation: int
    """Users with an event that is held out for validation."""
    train_length_counts: Counter
    train_action_counts: Counter
    """Code of an action -> training events."""
    chunks: list[ChunkRecord]


def write_shards(task: WriteTask) -> Written:
    """Split and number the users of one partition, write their chunks and their rows of the user table.

    The items that are trained on are counted on the way.
    """
    storage = Storage(task.root)
    users = read_parquet(storage, f"tmp/users/{task.index:05d}.parquet")
    events = read_parquet(storage, _gathered_name(task.index))
    offsets = offsets_of(users["length"])
    positive = np.isin(events["action"].to_numpy(), task.positive_codes)
    times = events["timestamp_s"].to_numpy() if "timestamp_s" in events.columns else None
    split = task.split.apply(offsets, positive, times)
    trained = _training_spans(offsets, split)
    _count_items(storage, task.index, events["item"].filter(pl.Series(positive & trained)))
    writer = ShardWriter(storage, task.index, chunk_users=task.chunk_users)
    writer.write(
        Chunk(
            users=np.arange(task.first_user, task.first_user + users.height, dtype=np.int64),
            offsets=offsets,
            train_end=split.train_end,
            valid_at=split.valid_at,
            test_at=split.test_at,
            items=events["item"].to_numpy(),
            columns={name: events[name].to_numpy() for name in events.columns if name != "item"},
        )
    )
    table = users.select("user_id")
    if storage.exists(PROFILES):
        ids = pl.col("user_id").cast(table.schema["user_id"], strict=False)
        # As numbers, 1 and 01 of a text file are one user.
        profiles = read_parquet(storage, PROFILES).with_columns(ids).unique("user_id", keep="first")
        table = table.join(profiles, on="user_id", how="left", maintain_order="left")
    write_parquet(storage, f"tmp/user_table/{task.index:05d}.parquet", table)
    return Written(
        index=task.index,
        num_events=events.height,
        num_validation=int((split.valid_at >= 0).sum()),
        train_length_counts=Counter(split.train_end.tolist()),
        train_action_counts=Counter(
            dict(enumerate(np.bincount(events["action"].to_numpy()[trained]).tolist()))
        ),
        chunks=writer.close(),
    )


def _training_spans(offsets: np.ndarray, split: Split) -> np.ndarray:
    """Which events lie in the training spans. Shapes: offsets [U + 1] -> [T] bool."""
    ends = np.repeat(offsets[:-1] + split.train_end, np.diff(offsets))
    return np.arange(len(ends)) < ends


def _count_items(storage: Storage, index: int, trained: pl.Series) -> None:
    counts = pl.DataFrame({"item": trained}).group_by("item").len("train_count")
    write_parquet(storage, f"tmp/train_counts/{index:05d}.parquet", counts)


def offsets_of(lengths: pl.Series) -> np.ndarray:
    """Shapes: [U] -> [U + 1] int64, exclusive."""
    return np.concatenate([[0], np.cumsum(lengths.to_numpy().astype(np.int64))])


def write_parquet(storage: Storage, name: str, frame: pl.DataFrame) -> None:
    """A temporary file of a build, by its name below the root; see `write_temporary`."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="lz4")
    write_temporary(storage, name, buffer.getvalue())


def write_temporary(storage: Storage, name: str, data: bytes) -> None:
    """Unlike `Storage.write` this does not wait for the disk: after a crash the build begins anew anyway."""
    path = storage.path(name)
    storage.filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    storage.filesystem.pipe_file(path, data)


def read_parquet(storage: Storage, name: str) -> pl.DataFrame:
    return pl.read_parquet(io.BytesIO(storage.read(name)))
