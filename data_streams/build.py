"""From raw logs to shards: events are partitioned by user, ordered, split and written, out of core."""

import hashlib
import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.configuration import ClusterConfig
from cluster.errors import ConfigError, DataError
from cluster.storage import Storage
from data_streams import partition
from data_streams.schema import EXPOSURE
from data_streams.shards import Manifest
from data_streams.sources import Source
from data_streams.splits import SplitRule

logger = logging.getLogger(__name__)

EVENTS_PER_PARTITION = 2_000_000


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    out: str
    """Folder or address the data set is written to."""
    overwrite: bool = False
    """Replace what is at `out`."""
    split: Literal["leave-last-out", "by-time"] = "leave-last-out"
    """leave-last-out holds out each user's last two events, by-time the first ones after two moments."""
    valid_from_s: int | None = None
    """First second of the validation period of by-time, since 1970."""
    test_from_s: int | None = None
    """First second of the test period of by-time, since 1970."""
    sequence_actions: tuple[str, ...] = ()
    """Actions that make up a user's sequence; left out, what the source proposes, else all but exposures."""
    keep_exposures: bool = False
    """Keep exposures among the events, for models that learn from what was shown and not chosen."""
    min_events_per_user: int = 1
    """Users with fewer events are left out."""
    max_events_per_user: int = 10_000
    """Longer users are cut to their latest events."""
    chunk_users: int = 512
    """Users that lie together in a chunk."""
    partitions: int | None = None
    """User partitions, each the work of one task; left out, one for every 2 million events."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """What an event without ids or time, or of an unknown item, does: end it or be counted and skipped."""
    ray: Literal["auto", "always", "never"] = "auto"
    """Whether the work is spread by Ray tasks; auto does where there is more than one partition."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the tasks run."""


class SourceConfig(Protocol):
    def build(self) -> Source: ...


def build(source_config: SourceConfig, config: BuildConfig) -> Manifest:
    """Write the data set of a source and return its manifest.

    All is written beside `out` and moved into place at the end, so an interrupted build leaves nothing there.

    Raises: ConfigError for options that do not fit each other or an `out` in use; DataError for bad input.
    """
    _check_options(config)
    parent, name = os.path.split(config.out.rstrip("/"))
    home = Storage(parent or ".")
    if home.list(name) and not config.overwrite:
        raise ConfigError(
            f"--out must be new or empty, but {config.out} holds files; name another or add --overwrite"
        )
    staged = f".{name}.building"
    home.delete(staged)
    home.make_directory(staged)
    try:
        staging = Storage(f"{parent or '.'}/{staged}")
        manifest = _Build(source_config.build(), config, staging).run()
        _publish(home, staged, name, manifest)
    finally:
        home.delete(staged)
    logger.info(
        "%s holds %d users, %d items and %d events in %d chunks",
        config.out,
        manifest.num_users,
        manifest.num_items,
        manifest.num_events,
        len(manifest.chunks),
    )
    return manifest


def _check_options(config: BuildConfig) -> None:
    times = (config.valid_from_s, config.test_from_s)
    if config.split == "by-time" and (None in times or times[0] > times[1]):
        raise ConfigError(
            "--split by-time needs --valid-from-s and, not before it, --test-from-s, in seconds since 1970; "
            f"given {times[0]} and {times[1]}"
        )
    if config.split != "by-time" and times != (None, None):
        raise ConfigError(
            f"--valid-from-s and --test-from-s belong to --split by-time, given --split {config.split}"
        )
    if EXPOSURE in config.sequence_actions:
        raise ConfigError(
            "--sequence-actions are what users chose; to keep exposures beside them say --keep-exposures"
        )
    for name in ("partitions", "chunk_users", "max_events_per_user", "min_events_per_user"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, given {value}")


def _publish(home: Storage, staged: str, name: str, manifest: Manifest) -> None:
    """The manifest appears when all else is there: with the rename of a local disk, else after the move."""
    if home.is_local:
        manifest.save(Storage(home.path(staged)))
    home.delete(name)
    home.rename(staged, name)
    if not home.is_local:
        manifest.save(Storage(home.filesystem.unstrip_protocol(home.path(name))))


class _Build:
    """The steps of one build, in order."""

    def __init__(self, source: Source, config: BuildConfig, staging: Storage):
        self.source, self.config, self.staging = source, config, staging
        self.root = staging.filesystem.unstrip_protocol(staging.root)
        estimate = source.estimate_num_events()
        self.num_partitions = config.partitions or max(1, -(-estimate // EVENTS_PER_PARTITION))
        self.split = SplitRule(
            name=config.split, valid_from_s=config.valid_from_s, test_from_s=config.test_from_s
        )
        self.counters = Counter()

    def run(self) -> Manifest:
        items = self.source.items()
        actions = self._scatter(collect_items=items is None)
        items = self._write_item_index(items)
        gathered = self._gather(actions)
        chunks = self._write_shards(gathered)
        self._write_users(gathered)
        catalogue = self._write_items(items)
        embedding = self._write_embeddings(items.height)
        self.staging.delete("tmp")
        self._log_counters()
        return Manifest(
            source=_plain(self.source.describe()),
            num_users=sum(part.num_users for part in gathered),
            num_items=items.height,
            num_events=sum(part.num_events for part in gathered),
            split=_plain(asdict(self.split)),
            columns=next(part.columns for part in gathered if part.num_users),
            actions=list(actions),
            train_length_counts=dict(sorted(_sum(part.train_length_counts for part in gathered).items())),
            counters={name: count for name, count in sorted(self.counters.items()) if count},
            chunks=chunks,
            catalogue_sha256=catalogue,
            embedding=embedding,
        )

    def _scatter(self, collect_items: bool) -> tuple[str, ...]:
        """Returns the actions that occur."""
        tasks = [
            partition.ScatterTask(
                source=self.source,
                part=part,
                index=index,
                root=self.root,
                num_partitions=self.num_partitions,
                actions=self.config.sequence_actions or self.source.sequence_actions(),
                keep_exposures=self.config.keep_exposures,
                on_bad_row=self.config.on_bad_row,
                collect_items=collect_items,
            )
            for index, part in enumerate(self.source.parts())
        ]
        results = self._run(partition.scatter, tasks, "reading events", lambda result: result.num_events)
        self.counters += _sum(result.counters for result in results)
        if not sum(result.num_events for result in results):
            raise DataError(
                f"a data set needs events, but {len(tasks)} files or parts held none that can be used "
                f"({_in_words(self.counters)}); check --events and --sequence-actions"
            )
        return tuple(sorted(frozenset().union(*(result.actions for result in results))))

    def _write_item_index(self, items: pl.DataFrame | None) -> pl.DataFrame:
        if items is None:
            names = self.staging.list("tmp/item_ids")
            ids = [partition.read_parquet(self.staging, f"tmp/item_ids/{name}")["item_id"] for name in names]
            items = pl.DataFrame({"item_id": pl.concat(ids).unique().sort()}).with_columns(
                title=pl.col("item_id").cast(pl.String), categories=pl.lit([], dtype=pl.List(pl.String))
            )
        rows = pl.int_range(pl.len(), dtype=pl.Int32 if items.height < 2**31 else pl.Int64).alias("item")
        partition.write_parquet(self.staging, partition.ITEM_INDEX, items.select("item_id", rows))
        return items

    def _gather(self, actions: tuple[str, ...]) -> list[partition.Gathered]:
        tasks = [
            partition.GatherTask(
                index=index,
                root=self.root,
                actions=actions,
                split=self.split,
                min_events_per_user=self.config.min_events_per_user,
                max_events_per_user=self.config.max_events_per_user,
                on_bad_row=self.config.on_bad_row,
            )
            for index in range(self.num_partitions)
        ]
        results = self._run(partition.gather, tasks, "ordering users", lambda result: result.num_events)
        self.counters += _sum(result.counters for result in results)
        if not sum(result.num_users for result in results):
            raise DataError(
                f"a data set needs users, but none is left ({_in_words(self.counters)}); "
                "lower --min-events-per-user or check the item table"
            )
        return results

    def _write_shards(self, gathered: list[partition.Gathered]) -> list[Any]:
        profiles = self.source.users()
        if profiles is not None:
            partition.write_parquet(self.staging, partition.PROFILES, profiles)
        first_users = np.cumsum([0, *(part.num_users for part in gathered)]).tolist()
        tasks = [
            partition.WriteTask(
                index=part.index, root=self.root, first_user=first_user, chunk_users=self.config.chunk_users
            )
            for part, first_user in zip(gathered, first_users, strict=False)
            if part.num_users
        ]
        written = self._run(partition.write_shards, tasks, "writing shards", lambda result: result.num_events)
        return [record for result in written for record in result.chunks]

    def _write_users(self, gathered: list[partition.Gathered]) -> None:
        """One table, written partition by partition."""
        writer = None
        with self.staging.filesystem.open(self.staging.path("users.parquet"), "wb") as file:
            for part in gathered:
                if not part.num_users:
                    continue
                name = f"tmp/user_table/{part.index:05d}.parquet"
                table = partition.read_parquet(self.staging, name).to_arrow()
                writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
                writer.write_table(table)
            writer.close()

    def _write_items(self, items: pl.DataFrame) -> str:
        """Returns the checksum of the table, by which a checkpoint knows its catalogue again."""
        names = self.staging.list("tmp/train_counts")
        parts = [partition.read_parquet(self.staging, f"tmp/train_counts/{name}") for name in names]
        counts = np.zeros(items.height, dtype=np.int64)
        for part in parts:
            counts[part["item"].to_numpy()] += part["train_count"].to_numpy()
        front = items.select("item_id", "title", "categories").with_columns(train_count=counts)
        further = [name for name in items.columns if name not in front.columns]
        buffer = io.BytesIO()
        front.with_columns(items.select(further)).write_parquet(buffer)
        self.staging.write("items.parquet", buffer.getvalue())
        return hashlib.sha256(buffer.getvalue()).hexdigest()

    def _write_embeddings(self, num_items: int) -> dict[str, Any] | None:
        matrix = self.source.embeddings()
        if matrix is None:
            return None
        if len(matrix) != num_items:
            raise DataError(
                f"embeddings must have one row per row of the item table: {num_items} are required, "
                f"{len(matrix)} are given; compute them for this table"
            )
        if matrix.dtype not in (np.float16, np.float32):
            matrix = matrix.astype(np.float32)
        with self.staging.filesystem.open(self.staging.path("item_embeddings.npy"), "wb") as file:
            np.lib.format.write_array(file, matrix, allow_pickle=False)
        return {"file": "item_embeddings.npy", "dim": matrix.shape[1], "dtype": str(matrix.dtype)}

    def _run(self, function: Callable, tasks: list, description: str, count: Callable[[Any], int]) -> list:
        """Results of all tasks in the order of their index, with a progress bar."""
        results = []
        with _progress() as progress:
            bar = progress.add_task(description, total=len(tasks), events=0, rate=0.0)
            for result in self._results(function, tasks, description):
                results.append(result)
                events = progress.tasks[bar].fields["events"] + count(result)
                rate = events / max(progress.tasks[bar].elapsed, 1e-3)
                progress.update(bar, advance=1, events=events, rate=rate)
        return sorted(results, key=lambda result: result.index)

    def _results(self, function: Callable, tasks: list, description: str) -> Iterator[Any]:
        if self.config.ray == "never" or (self.config.ray == "auto" and self.num_partitions == 1):
            return map(function, tasks)
        from cluster.tasks import run_tasks

        return run_tasks(function, tasks, description=description, config=self.config.cluster)

    def _log_counters(self) -> None:
        for name, count in sorted(self.counters.items()):
            if count and name != "events read":
                logger.info("build: %d %s", count, name)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:>16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[events]:,} events, {task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
    )


def _sum(counters: Iterator[Counter]) -> Counter:
    total = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _in_words(counters: Counter) -> str:
    return (
        ", ".join(f"{count} {name}" for name, count in sorted(counters.items()) if count) or "none were read"
    )


def _plain(values: Any) -> Any:
    """Tuples become lists, so that the manifest in memory equals the one on disk."""
    if isinstance(values, dict):
        return {name: _plain(value) for name, value in values.items()}
    return [_plain(value) for value in values] if isinstance(values, (tuple, list)) else values
