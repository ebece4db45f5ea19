"""From raw logs to shards: events are partitioned by user, ordered, split and written, out of core."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.errors import ConfigError, DataError
from cluster.storage import Storage
from data_streams import core_filter, partition
from data_streams.build_config import BuildConfig, check_options
from data_streams.build_place import BuildPlace
from data_streams.catalogue import Catalogue
from data_streams.moments import at_shares, before_the_end
from data_streams.shards import Manifest
from data_streams.sources import Source
from data_streams.splits import SplitRule
from data_streams.user_table import USERS_NAME

logger = logging.getLogger(__name__)

EVENTS_PER_PARTITION = 2_000_000
MAX_ACTIONS = 128
"""Their codes are signed bytes."""


class SourceConfig(Protocol):
    """Options of a source: the Config of each file in `data_streams.sources` is one."""

    def build(self) -> Source: ...


def build(source_config: SourceConfig, config: BuildConfig) -> Manifest:
    """Write the data set of a source and return its manifest.

    All is written beside `out` and moved into place at the end, so an interrupted build leaves what was there.

    Raises: ConfigError for options that do not fit each other or an `out` in use; DataError for bad input.
    """
    check_options(config)
    place = BuildPlace.of(config.out, overwrite=config.overwrite)
    staging = place.open_staging()
    try:
        manifest = _Build(source_config.build(), config, staging).run()
        place.publish(manifest)
    finally:
        place.discard()
    logger.info(
        "%s holds %s users, %s items and %s events in %s chunks",
        config.out,
        *(f"{number:,}" for number in (manifest.num_users, manifest.num_items, manifest.num_events)),
        f"{len(manifest.chunks):,}",
    )
    return manifest


class _Build:
    """The steps of one build, in order."""

    def __init__(self, source: Source, config: BuildConfig, staging: Storage):
        self.source, self.config, self.staging = source, config, staging
        self.root = staging.filesystem.unstrip_protocol(staging.root)
        estimate = source.estimate_num_events()
        self.num_partitions = config.partitions or max(1, -(-estimate // EVENTS_PER_PARTITION))
        self.counters = Counter()

    def run(self) -> Manifest:
        table = self.source.items()
        actions = self._scatter(collect_items=table is None or self.source.takes_items_of_events())
        catalogue = Catalogue(self.staging, table)
        self._leave_out_items(catalogue)
        gathered = self._gather(actions)
        split = self._split_rule(gathered)
        written = self._write_shards(gathered, actions, split)
        self._write_users(gathered)
        checksum = catalogue.write_items()
        embedding = catalogue.write_embeddings(self.source.embeddings())
        self.staging.delete("tmp")
        self._log_counters()
        return Manifest(
            source=_plain(self.source.describe()),
            num_users=sum(part.num_users for part in gathered),
            num_items=catalogue.num_items,
            num_events=sum(part.num_events for part in gathered),
            split=_plain(asdict(split) | self._page_actions()),
            columns=next(part.columns for part in gathered if part.num_users),
            actions=list(actions),
            train_length_counts=dict(sorted(_sum(part.train_length_counts for part in written).items())),
            num_train_history_events=self._num_train_history_events(written, actions),
            counters={name: count for name, count in sorted(self.counters.items()) if count},
            chunks=[record for part in written for record in part.chunks],
            catalogue_sha256=checksum,
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
                beside=self.config.beside,
                on_bad_row=self.config.on_bad_row,
                collect_items=collect_items,
            )
            for index, part in enumerate(self.source.parts())
        ]
        results = self._run(partition.scatter, tasks, "reading events")
        self.counters += _sum(result.counters for result in results)
        if not sum(result.num_events for result in results):
            raise DataError(
                f"a data set needs events, but {len(tasks)} files or parts held none that can be used "
                f"({_in_words(self.counters)}); check --events and --sequence-actions"
            )
        _check_schemas(frozenset().union(*(result.schemas for result in results)))
        actions = tuple(sorted(frozenset().union(*(result.actions for result in results))))
        if len(actions) > MAX_ACTIONS:
            raise DataError(
                f"a data set can have {MAX_ACTIONS} actions, and there are {len(actions)}, such as "
                f"{', '.join(actions[:3])}; name those that count with --sequence-actions, or another --action-column"
            )
        self._tell_unknown(actions)
        return actions

    def _tell_unknown(self, actions: tuple[str, ...]) -> None:
        """A name that no event has may be a typing mistake, or an action that is rare."""
        for option in ("sequence_actions", "page_actions", "split_actions"):
            unknown = [name for name in getattr(self.config, option) if name not in actions]
            if unknown:
                logger.warning(
                    "no event has the action %s of --%s; the actions that were read are %s",
                    *(", ".join(unknown), option.replace("_", "-"), ", ".join(actions)),
                )

    def _leave_out_items(self, catalogue: Catalogue) -> None:
        config = self.config
        if not config.min_item_events:
            return
        indices = range(self.num_partitions)
        number_tasks = [
            core_filter.NumberTask(index=index, root=self.root, beside=self.config.beside)
            for index in indices
        ]
        self._run(core_filter.number_events, number_tasks, "numbering events")
        tasks = [
            core_filter.CountTask(index=index, root=self.root, min_user_events=config.min_user_events)
            for index in indices
        ]
        core = core_filter.find_core(
            self.staging,
            lambda: self._stream(core_filter.count_items, tasks, "counting items"),
            num_items=catalogue.num_items,
            min_item_events=config.min_item_events,
            max_passes=config.filter_passes,
        )
        left_out = len(core.kept) - int(core.kept.sum())
        self.counters[f"items with fewer than {config.min_item_events} events"] += left_out
        self.counters["passes over users and items"] += core.passes
        catalogue.keep(core.kept)

    def _gather(self, actions: tuple[str, ...]) -> list[partition.Gathered]:
        tasks = [
            partition.GatherTask(
                index=index,
                root=self.root,
                actions=actions,
                beside=self.config.beside,
                page_rule=self.source.page_rule(),
                min_user_events=self.config.min_user_events,
                min_item_events=self.config.min_item_events,
                max_events_per_user=self.config.max_events_per_user,
                on_bad_row=self.config.on_bad_row,
            )
            for index in range(self.num_partitions)
        ]
        results = self._run(partition.gather, tasks, "ordering users")
        self.counters += _sum(result.counters for result in results)
        if not sum(result.num_users for result in results):
            raise DataError(
                f"a data set needs users, but none is left ({_in_words(self.counters)}); "
                "lower --min-user-events or check the item table"
            )
        return results

    def _split_rule(self, gathered: list[partition.Gathered]) -> SplitRule:
        config = self.config
        moments = {"valid_from_s": config.valid_from_s, "test_from_s": config.test_from_s}
        if config.test_days is not None:
            found = before_the_end(gathered, valid_days=config.valid_days, test_days=config.test_days)
            moments = asdict(found)
        elif config.train_share is not None:
            found = at_shares(
                self.staging, gathered, train_share=config.train_share, valid_share=config.valid_share
            )
            moments = asdict(found)
        return SplitRule(name=config.split, **moments)

    def _write_shards(
        self, gathered: list[partition.Gathered], actions: tuple[str, ...], split: SplitRule
    ) -> list[partition.Written]:
        profiles = self.source.users()
        if profiles is not None:
            partition.write_parquet(self.staging, partition.PROFILES, profiles)
        first_users = np.cumsum([0, *(part.num_users for part in gathered)]).tolist()
        tasks = [
            partition.WriteTask(
                index=part.index,
                root=self.root,
                split=split,
                positive_codes=self._positive_codes(actions),
                first_user=first_user,
                chunk_users=self.config.chunk_users,
            )
            for part, first_user in zip(gathered, first_users, strict=False)
            if part.num_users
        ]
        written = self._run(partition.write_shards, tasks, "writing shards")
        if not sum(part.num_validation for part in written):
            logger.warning(
                "no user has an event that is held out for validation, so training cannot tell its best step and no "
                "alignment starts; build from more events or with another --split"
            )
        return written

    def _page_actions(self) -> dict[str, Any]:
        """What a reader must know to tell the sequence from what lies beside it."""
        return {"page_actions": self.config.page_actions} if self.config.page_actions else {}

    def _num_train_history_events(self, written: list[partition.Written], actions: tuple[str, ...]) -> int:
        counts = _sum(part.train_action_counts for part in written)
        return sum(count for code, count in counts.items() if actions[code] not in self.config.beside)

    def _positive_codes(self, actions: tuple[str, ...]) -> tuple[int, ...]:
        wanted = self.config.split_actions or [name for name in actions if name not in self.config.beside]
        missing = [name for name in wanted if name not in actions]
        if missing:
            raise ConfigError(
                f"--split-actions must be among the actions that are kept, {', '.join(actions)}, and "
                f"{', '.join(missing)} are not; add them to --sequence-actions"
            )
        return tuple(actions.index(name) for name in wanted)

    def _write_users(self, gathered: list[partition.Gathered]) -> None:
        """One table, written partition by partition."""
        writer = None
        with self.staging.filesystem.open(self.staging.path(USERS_NAME), "wb") as file:
            for part in gathered:
                if not part.num_users:
                    continue
                name = f"tmp/user_table/{part.index:05d}.parquet"
                table = partition.read_parquet(self.staging, name).to_arrow()
                writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
                writer.write_table(table)
            writer.close()

    def _run(self, function: Callable, tasks: list, description: str) -> list:
        """Results of all tasks in the order of their index."""
        return sorted(self._stream(function, tasks, description), key=lambda result: result.index)

    def _stream(self, function: Callable, tasks: list, description: str) -> Iterator[Any]:
        """Results in the order of completion, with a progress bar."""
        with _progress() as progress:
            bar = progress.add_task(description, total=len(tasks), events=0, rate=0.0)
            for result in self._results(function, tasks, description):
                events = progress.tasks[bar].fields["events"] + result.num_events
                rate = events / max(progress.tasks[bar].elapsed, 1e-3)
                progress.update(bar, advance=1, events=events, rate=rate)
                yield result

    def _results(self, function: Callable, tasks: list, description: str) -> Iterator[Any]:
        if self.config.ray == "never" or (self.config.ray == "auto" and self.num_partitions == 1):
            return map(function, tasks)
        from cluster.tasks import run_tasks

        return run_tasks(function, tasks, description=description, config=self.config.cluster)

    def _log_counters(self) -> None:
        for name, count in sorted(self.counters.items()):
            if count and name != "events read":
                logger.info("build: %d %s", count, name)


def _check_schemas(schemas: frozenset[tuple[tuple[str, str], ...]]) -> None:
    """Every chunk must hold every column, and the same id is told from another by its type as well."""
    tables = [dict(schema) for schema in schemas]
    for name in sorted({name for table in tables for name in table}):
        types = {table.get(name, "missing") for table in tables}
        if len(types) > 1:
            raise DataError(
                f"{name} must be of one type in all files of events, and is {' and '.join(sorted(types))}; columns of "
                ".csv and .tsv are text, those of .parquet may be numbers; write all files with the same columns, in "
                "one of these forms"
            )


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
