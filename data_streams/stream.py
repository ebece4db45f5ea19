"""The stream a trainer reads: this rank's share of the users, step by step."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from cluster.errors import ConfigError, DataError
from cluster.storage import Storage
from data_streams import token_budget
from data_streams.batch import SequenceBatch
from data_streams.canonical import CanonicalStream, ChunkReader, deal_epoch
from data_streams.configuration import DataConfig
from data_streams.item_table import ItemTable
from data_streams.jagged import offsets_of
from data_streams.manifest import Manifest
from data_streams.target_pages import EventReading
from data_streams.user_block import UserBlock, collate

log = logging.getLogger(__name__)

PAGE_OPTIONS = (
    "pages",
    "page_gap_s",
    "page_events",
    "page_borders",
    "page_items",
    "page_ordered",
    "page_disliked",
    "history_exposures",
)
PAGE_COUNTERS = ("pages", "pages_without_target", "pages_without_history")
ORDER_OPTIONS = ("max_length", "tokens_per_step", "num_streams", "shuffle_chunks")

Position = Mapping[str, Any]
"""Where training stands within an epoch, as plain JSON values; covers all streams once merged."""


class TrainStream:
    """The training users, in an order that depends on (seed, epoch, step) alone.

    Stream c of the canonical streams is served by rank c % world_size; a rank's batch holds the users of its
    streams in ascending order of the stream. So the users of a step are the same at every world size.
    """

    def __init__(self, config: DataConfig, *, seed: int, rank: int, world_size: int):
        """Raises: ConfigError when options cannot work with the data, DataError when there is no data set."""
        if world_size > config.num_streams:
            raise ConfigError(
                f"data.num-streams must be at least the number of workers: {config.num_streams} streams "
                f"cannot feed {world_size} workers; raise data.num-streams to {world_size} or more"
            )
        if seed < 0:
            raise ConfigError(f"seed must be at least 0, is {seed}")
        storage, self.manifest = open_data(config)
        self._config, self._seed = config, seed
        self._streams = range(rank, config.num_streams, world_size)
        self._reading = EventReading(self.manifest, config, "train")
        self._history_share = history_share(self.manifest, config)
        self._reader = ChunkReader(storage, self.manifest, config, self._reading)
        self._order = _order_of(self.manifest, config, seed)
        if self._reading.drops_events:
            # Users are dealt by it, and it may change where the same events are built again.
            self._order["the share of history events"] = round(self._history_share, 9)
        self.epoch_totals: dict[str, int] = {}
        """What this rank met in the last epoch that `batches` came to the end of; `check_epoch` reads it."""
        if not self.steps_per_epoch():
            raise DataError(
                f"no user of {config.path} has two training events, so there is nothing to learn from; build "
                "the shards from more events or with another split"
            )
        self._log_cut_users()
        self._reading.log_pages()

    def batches(self, epoch: int, position: Position | None = None) -> Iterator[SequenceBatch]:
        """This rank's batch of each step, until all its streams have run out; other ranks may go on.

        A batch can be empty, when long users have used up the budget of its step. `position` is the merged
        position of all ranks after the last step that counts, taken at this or another world size.

        Raises: ConfigError when the position was taken with other options or data.
        """
        streams = self._open_streams(epoch, position)
        step = position["step"] if position else 0
        num_users = num_pages = 0
        while any(stream.has_users() for stream in streams.values()):
            blocks = [block for stream in streams.values() for block in stream.take(step)]
            step += 1
            batch = collate(blocks or [self._no_users()], self._position(epoch, step, streams))
            num_users += batch.num_users
            num_pages += 0 if batch.pages is None else batch.pages.num_pages
            yield batch
        self.epoch_totals = self._totals(num_users, num_pages)

    def check_epoch(self, totals: Mapping[str, int]) -> None:
        """Whether there was anything to learn from: `totals` are the `epoch_totals` of all ranks, added up.

        One rank may have nothing beside others that have. Raises: DataError when no rank could read any user, or
        pages are asked for and none is left.
        """
        if totals["chunks_skipped"] and not totals["users"]:
            raise DataError(
                f"training needs users, but all chunks with training users are bad in {self._config.path}; look "
                "at the warnings above, then copy the shards again or build them again"
            )
        if totals["users"] and self._reading.has_pages and not totals["target_pages"]:
            raise _no_target_pages(self._config.path, totals)

    def check_position(self, epoch: int, position: Position) -> None:
        """The order of users follows from these options, so a position means nothing under others. One that an older
        version did not know yet is passed over.

        Raises: ConfigError when the position was taken with other options or data.
        """
        given = position["order"]
        changed = [name for name in self._order if name in given and given[name] != self._order[name]]
        if changed:
            differences = (f"{name} was {given[name]}, is {self._order[name]}" for name in changed)
            raise ConfigError(
                "training cannot go on in the middle of an epoch with another order of users: "
                f"{'; '.join(differences)}; put the options back, or start again in another --run-dir"
            )
        missing = [stream for stream in self._streams if str(stream) not in position["streams"]]
        if position["epoch"] != epoch or missing:
            raise ConfigError(
                f"the data position must be of epoch {epoch} and hold all {self._config.num_streams} streams"
                f", but is of epoch {position['epoch']} and lacks {missing}; merge those of all workers"
            )

    def own_position(self, epoch: int, position: Position | None) -> Position:
        """This rank's part of a merged position, or of the beginning of an epoch."""
        if position is None:
            return self._position(epoch, 0, self._open_streams(epoch, None))
        states = {str(stream): position["streams"][str(stream)] for stream in self._streams}
        return {**position, "streams": states}

    def empty_batch(self) -> SequenceBatch:
        """A batch without users, for a rank whose streams have run out before those of others."""
        return collate([self._no_users()])

    def steps_per_epoch(self) -> int:
        """Expected steps of an epoch, equal on all ranks; a few more can come where streams are unequal."""
        return token_budget.steps_per_epoch(self.manifest, self._config, self._history_share)

    @property
    def counters(self) -> dict[str, int]:
        """Users of the data set that are cut or left out, and what this rank has skipped so far."""
        lengths = self.manifest.train_length_counts
        longest = self._config.max_length / self._history_share + 1
        return {
            "users_cut": sum(users for length, users in lengths.items() if length > longest),
            "users_empty": lengths.get(0, 0),
            "users_too_short": lengths.get(1, 0),
            "chunks_skipped": len(self._reader.skipped),
            "users_in_skipped_chunks": sum(self._reader.skipped.values()),
            **self._reading.counters,
        }

    def _totals(self, num_users: int, num_pages: int) -> dict[str, int]:
        """The same keys in the same order on every rank."""
        met = {name: self._reading.counters[name] for name in PAGE_COUNTERS}
        skipped = len(self._reader.skipped)
        return {"users": num_users, "target_pages": num_pages, "chunks_skipped": skipped, **met}

    def _open_streams(self, epoch: int, position: Position | None) -> dict[int, CanonicalStream]:
        if position is not None:
            self.check_position(epoch, position)
        deal = deal_epoch(self.manifest, self._config, self._seed, epoch, self._history_share)
        return {
            stream: CanonicalStream(
                self._reader,
                deal.pieces(stream),
                self._config,
                (self._seed, epoch, stream),
                position["streams"][str(stream)] if position else None,
            )
            for stream in self._streams
        }

    def _position(self, epoch: int, step: int, streams: Mapping[int, CanonicalStream]) -> Position:
        states = {str(number): stream.state() for number, stream in streams.items()}
        return {"epoch": epoch, "step": step, "streams": states, "order": self._order}

    def _no_users(self) -> UserBlock:
        empty, nobody = self._reader.no_events(), np.zeros(0, dtype=np.int64)
        return UserBlock(
            user_ids=nobody,
            offsets=offsets_of(nobody),
            inputs=empty,
            targets=empty,
            pages=self._reader.no_pages(0),
        )

    def _log_cut_users(self) -> None:
        counters = self.counters
        if counters["users_cut"]:
            log.info(
                "%d of %d users have more than %d training inputs (data.max-length); the oldest are left out",
                counters["users_cut"],
                self.manifest.num_users,
                self._config.max_length,
            )


def merge_positions(positions: Iterable[Position]) -> Position:
    """The position of a whole step from those of all ranks; a rank that ran out gives its last one."""
    positions = list(positions)
    states = {number: state for position in positions for number, state in position["streams"].items()}
    streams = {number: states[number] for number in sorted(states, key=int)}
    return {**positions[0], "step": max(position["step"] for position in positions), "streams": streams}


def open_data(config: DataConfig) -> tuple[Storage, Manifest]:
    """The data set of a configuration.

    Raises: ConfigError for options that cannot work with it, DataError when it cannot be read.
    """
    if not config.path:
        raise ConfigError("data.path must name the folder of the shards; make one with `grail data build`")
    options = asdict(config)
    for name in (*ORDER_OPTIONS, "prefetch_steps"):
        if options[name] < 1:
            raise ConfigError(f"data.{name.replace('_', '-')} must be at least 1, is {options[name]}")
    storage = Storage(config.path)
    manifest = Manifest.load(storage)
    missing = [name for name in config.columns if name not in manifest.columns]
    if missing:
        raise ConfigError(
            f"the model needs the event columns {', '.join(missing)} (data.columns), but {config.path} holds "
            f"{', '.join(sorted(manifest.columns)) or 'none'}; build the shards from a source that has "
            "them, or turn off the option of the model that reads them, where it has one"
        )
    return storage, manifest


def history_share(manifest: Manifest, config: DataConfig) -> float:
    """Share of the training events that is part of histories; exposures and the like can lie beside them."""
    if not EventReading(manifest, config, "train").drops_events:
        return 1.0
    events = sum(length * users for length, users in manifest.train_length_counts.items())
    chosen = manifest.num_train_history_events
    if chosen is None:
        # As good as it gets: without the training events that cannot be held out (--split-actions).
        chosen = int(ItemTable.load(config.path).train_counts.sum())
    return max(min(chosen / max(events, 1), 1.0), 1e-3)


def _no_target_pages(path: str, counters: Mapping[str, int]) -> DataError:
    return DataError(
        f"training on pages needs pages with a chosen item and a history before them, and of the "
        f"{counters['pages']} pages of {path} none is left ({counters['pages_without_target']} have no chosen "
        f"item, {counters['pages_without_history']} no history); build the data with clicks or purchases on its "
        "pages, or say --data.pages count"
    )


def _order_of(manifest: Manifest, config: DataConfig, seed: int) -> dict[str, Any]:
    options = asdict(config)
    paged = config.pages != "none" or config.history_exposures
    names = (*ORDER_OPTIONS, *(PAGE_OPTIONS if paged else ()))
    order = {f"data.{name}": options[name] for name in names}
    order |= {"seed": seed, "the content of data.path": manifest.fingerprint()}
    # As it will be read: JSON has no tuples.
    return json.loads(json.dumps(order))
