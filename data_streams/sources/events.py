"""Event logs in Parquet, CSV or TSV, with optional tables of items and users and item embeddings."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from cluster.errors import DataError
from cluster.storage import Storage
from data_streams import schema
from data_streams.sources import Part, Source

BATCH_ROWS = 500_000
PART_ROWS = 4_000_000
BYTES_PER_TEXT_ROW = 40
SEPARATORS = {".csv": ",", ".tsv": "\t"}
EMBEDDING_BLOCK_ROWS = 65_536


class EventsSource(Source):
    """Reads tables a person has at hand; columns are mapped by name."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        events: tuple[str, ...]
        """Files or glob patterns of events (.parquet, .csv, .tsv), read in the order of their names."""
        items: str | None = None
        """Table of items; left out, the items are those of the events."""
        users: str | None = None
        """Table of user profiles."""
        embeddings: str | None = None
        """Matrix of item vectors (.npy) whose row i belongs to row i of the item table."""
        user_column: str | None = None
        """Column of user ids; left out, user_id."""
        item_column: str | None = None
        """Column of item ids; left out, item_id."""
        timestamp_column: str | None = None
        """Column of event times; left out, timestamp_s or timestamp where there is one. Numbers since 1970, dates, or
        text such as 2020-01-31 18:00:00, which is UTC unless an offset such as +02:00 stands behind it."""
        time_unit: Literal["s", "ms", "us", "ns"] = "s"
        """Unit of event times that are plain numbers since 1970."""
        order_column: str | None = None
        """Column that orders the events of a user; left out, they are ordered by time."""
        action_column: str | None = None
        """Column of actions (exposure, click, purchase, ...); left out, action, else all are clicks."""
        page_column: str | None = None
        """Column that is equal for events of one request; left out, page_id where there is one."""
        position_column: str | None = None
        """Column of the place on the page; left out, position where there is one."""
        play_time_column: str | None = None
        """Column of seconds spent; left out, play_time_s where there is one."""
        duration_column: str | None = None
        """Column of the item's length in seconds; left out, duration_s where there is one."""
        feature_columns: tuple[str, ...] = ()
        """Further event columns of whole numbers to keep."""
        title_column: str | None = None
        """Column of titles in the item table; left out, title, else items are called by their ids."""
        categories_column: str | None = None
        """Column of categories in the item table (a list, or text separated by |); left out, categories."""

        def build(self) -> "EventsSource":
            return EventsSource(self)

    def __init__(self, config: Config):
        self.config = config
        self.files = _find_files(config.events)

    def describe(self) -> Mapping[str, Any]:
        return {"name": "events", **asdict(self.config)}

    def parts(self) -> list[Part]:
        parts = []
        for path in self.files:
            if _extension(path) != ".parquet":
                parts.append(Part(name=path))
                continue
            num_rows = _num_parquet_rows(path)
            starts = range(0, num_rows, PART_ROWS)
            parts += [Part(name=path, start=start, stop=min(start + PART_ROWS, num_rows)) for start in starts]
        return parts

    def estimate_num_events(self) -> int:
        return sum(_estimate_rows(path) for path in self.files)

    def read(self, part: Part) -> Iterator[pl.DataFrame]:
        rows = _scan(part.name)
        columns = self._columns(rows, part.name)
        keep = {*columns.values(), *self.config.feature_columns}
        if self.config.order_column is not None:
            keep.add(self.config.order_column)
        length = None if part.stop is None else part.stop - part.start
        selected = rows.select(sorted(keep)).slice(part.start, length)
        for batch in _batches(selected, part.name):
            yield schema.normalise_events(
                batch,
                columns,
                time_unit=self.config.time_unit,
                order_column=self.config.order_column,
                feature_columns=self.config.feature_columns,
            )

    def items(self) -> pl.DataFrame | None:
        config = self.config
        if config.items is None:
            return None
        frame = _read_table(config.items, "the item table")
        return schema.normalise_items(
            frame,
            f"the item table {config.items}",
            item_column=_first_present(frame, config.item_column, "item_id"),
            title_column=config.title_column or _present(frame, "title"),
            categories_column=config.categories_column or _present(frame, "categories"),
        )

    def users(self) -> pl.DataFrame | None:
        config = self.config
        if config.users is None:
            return None
        frame = _read_table(config.users, "the user table")
        column = _first_present(frame, config.user_column, "user_id")
        return schema.normalise_users(frame, f"the user table {config.users}", user_column=column)

    def embeddings(self) -> np.ndarray | None:
        path = self.config.embeddings
        if path is None:
            return None
        if self.config.items is None:
            raise DataError(
                f"embeddings {path} need an item table that says which row is which item; give --items"
            )
        if not path.endswith(".npy") or not os.path.exists(path):
            raise DataError(
                f"embeddings must be an existing .npy file on this machine, given {path}; save the matrix with "
                "numpy.save"
            )
        try:
            matrix = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(
                f"embeddings {path} are not a plain NumPy array ({error}); save the matrix with numpy.save"
            ) from error
        _check_matrix(matrix, path)
        return matrix

    def _columns(self, rows: pl.LazyFrame, path: str) -> dict[str, str]:
        config = self.config
        try:
            given = rows.collect_schema().names()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise _unreadable(path, error) from error
        named = {
            "user_id": config.user_column,
            "item_id": config.item_column,
            "timestamp_s": config.timestamp_column,
            "action": config.action_column,
            "page_id": config.page_column,
            "position": config.position_column,
            "play_time_s": config.play_time_column,
            "duration_s": config.duration_column,
        }
        self._check_order(given, path)
        return schema.choose_columns(f"events in {path}", given, named)

    def _check_order(self, given: list[str], path: str) -> None:
        config = self.config
        for name in (config.order_column, *config.feature_columns):
            if name is not None and name not in given:
                raise DataError(
                    f"events in {path} must have the column {name!r}; their columns are {', '.join(given)}"
                )
        schema.check_feature_names(config.feature_columns)
        timed = config.timestamp_column or "timestamp_s" in given or "timestamp" in given
        if config.order_column is None and not timed:
            raise DataError(
                f"events in {path} must have times (timestamp_s or timestamp) or a column that orders them; "
                f"their columns are {', '.join(given)}; give --timestamp-column NAME or --order-column NAME"
            )


def _find_files(patterns: tuple[str, ...]) -> list[str]:
    files = []
    for pattern in patterns:
        storage = Storage(pattern)
        filesystem, path = storage.filesystem, storage.root
        is_pattern = any(mark in path for mark in "*?[") and not filesystem.exists(path)
        found = sorted(filesystem.glob(path)) if is_pattern else [path]
        found = [name for name in found if filesystem.exists(name)]
        if not found:
            raise DataError(f"events must be files, but nothing is at {pattern}; check --events")
        remote = "://" in pattern and not pattern.startswith("file://")
        files += [filesystem.unstrip_protocol(name) if remote else name for name in found]
    for path in files:
        _extension(path)
    # Patterns may overlap, and a file that is read twice doubles its events.
    return sorted(set(files))


def _extension(path: str) -> str:
    extension = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    if extension not in (".parquet", *SEPARATORS):
        raise DataError(
            f"a table must be a .parquet, .csv or .tsv file (text may be gzipped, .csv.gz), given {path}; convert it "
            "to one of them"
        )
    return extension


def _scan(path: str) -> pl.LazyFrame:
    """Text files are read as text: the schema decides about types, not the first rows of the file."""
    extension, glob = _extension(path), not os.path.exists(path)
    if extension == ".parquet":
        return pl.scan_parquet(path, glob=glob)
    return pl.scan_csv(path, separator=SEPARATORS[extension], infer_schema=False, glob=glob)


def _batches(rows: pl.LazyFrame, path: str) -> Iterator[pl.DataFrame]:
    try:
        yield from rows.collect_batches(chunk_size=BATCH_ROWS, maintain_order=True)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> DataError:
    # What follows the first line advises options that only the library has.
    cause = str(error).strip().partition("\n")[0]
    return DataError(
        f"{path} cannot be read: {cause}; it must be UTF-8 with a header and as many fields in every row, or Parquet; "
        "write it again or leave it out"
    )


def _read_table(path: str, role: str) -> pl.DataFrame:
    _extension(path)
    try:
        return _scan(path).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{role} {path} cannot be read: {error}; check the path and the file") from error


def _num_parquet_rows(path: str) -> int:
    try:
        return _scan(path).select(pl.len()).collect().item()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(path, error) from error


def _estimate_rows(path: str) -> int:
    if _extension(path) == ".parquet":
        return _num_parquet_rows(path)
    return Storage(path).size("") // BYTES_PER_TEXT_ROW


def _present(frame: pl.DataFrame, name: str) -> str | None:
    return name if name in frame.columns else None


def _first_present(frame: pl.DataFrame, asked: str | None, default: str) -> str:
    """The id column of a side table: called as in the events, or by its schema name."""
    return asked if asked is not None and asked in frame.columns else default


def _check_matrix(matrix: np.ndarray, path: str) -> None:
    if matrix.ndim != 2 or matrix.dtype.kind != "f" or not matrix.shape[1]:
        raise DataError(
            f"{path} must be a matrix of floats [items, dim], given {matrix.dtype} {matrix.shape}"
        )
    for start in range(0, len(matrix), EMBEDDING_BLOCK_ROWS):
        finite = np.isfinite(matrix[start : start + EMBEDDING_BLOCK_ROWS]).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise DataError(
                f"{path} must hold finite numbers, but row {row} has NaN or infinity; compute it again"
            )
