"""The items of a data set: raw ids, titles, categories, training counts and embeddings, by item row."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from cluster.errors import ConfigError, DataError
from cluster.plugins import suggestion
from cluster.storage import Storage
from data_streams.manifest import REBUILD, Manifest

ITEMS_NAME = "items.parquet"
EMBEDDINGS_NAME = "item_embeddings.npy"
FINITE_SAMPLE_ROWS = 10_000
_HASHED_ROWS = 100_000
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, kw_only=True)
class ItemTable:
    """Shapes: N items; entry i of everything belongs to item row i."""

    item_ids: pl.Series
    """[N] raw ids, as the source wrote them."""
    titles: pl.Series
    """[N] text; the raw id where an item has no title."""
    categories: pl.Series | None
    """[N] as the source gave them; None where it gave none."""
    train_counts: np.ndarray
    """[N] int64, occurrences of each item in the training spans."""
    embeddings: np.ndarray | None
    """[N, E] float16 or float32; on a local disk mapped into memory, not read."""

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @cached_property
    def fingerprint(self) -> str:
        return catalogue_fingerprint(self.item_ids)

    @staticmethod
    def load(path: str) -> "ItemTable":
        """Raises: DataError when a file is missing, of another build, or does not fit the manifest."""
        storage = Storage(path)
        manifest = Manifest.load(storage)
        frame = _read_items(storage, manifest)
        ids = frame["item_id"]
        titles = frame["title"] if "title" in frame.columns else ids
        return ItemTable(
            item_ids=ids,
            titles=titles.cast(pl.String).zip_with(titles.is_not_null(), ids.cast(pl.String)),
            categories=_categories(frame),
            train_counts=frame["train_count"].cast(pl.Int64).to_numpy(),
            embeddings=_read_embeddings(storage, manifest),
        )


def shown_title(title: str) -> str:
    """A title for a line of a terminal: without line breaks, and cut off where it is very long."""
    line = " ".join(title.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[: _SHOWN_CHARACTERS - 1]}…"


def _categories(frame: pl.DataFrame) -> pl.Series | None:
    """None where no item has any: the build writes the column for every source."""
    if "categories" not in frame.columns or not frame["categories"].list.len().sum():
        return None
    return frame["categories"]


def catalogue_fingerprint(item_ids: pl.Series) -> str:
    """Changes with the items of a catalogue and with their order."""
    digest = hashlib.sha256()
    for start in range(0, len(item_ids), _HASHED_ROWS):
        digest.update(json.dumps(item_ids.slice(start, _HASHED_ROWS).to_list()).encode())
    return digest.hexdigest()[:16]


def read_item_column(path: str, name: str) -> pl.Series:
    """One column of the item table, by item row. Raises: as `read_item_columns`."""
    (column,) = read_item_columns(path, [name])
    return column


def read_item_columns(path: str, names: Sequence[str]) -> list[pl.Series]:
    """Some columns of the item table, by item row, with one look at the file.

    Raises: ConfigError where there is none of a name; DataError as `ItemTable.load`.
    """
    storage = Storage(path)
    frame = _read_items(storage, Manifest.load(storage))
    for name in names:
        if name not in frame.columns:
            raise ConfigError(f"the items of {path} have no column '{name}'{suggestion(name, frame.columns)}")
    return [frame[name] for name in names]


def item_columns(path: str) -> list[str]:
    """Names of the columns of the item table. Raises: DataError as `ItemTable.load`."""
    storage = Storage(path)
    return _read_items(storage, Manifest.load(storage)).columns


def _read_items(storage: Storage, manifest: Manifest) -> pl.DataFrame:
    path = storage.path(ITEMS_NAME)
    try:
        data = storage.read(ITEMS_NAME)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; copy it again or {REBUILD}") from error
    if manifest.catalogue_sha256 and hashlib.sha256(data).hexdigest() != manifest.catalogue_sha256:
        raise DataError(f"{path} is not the file the manifest was written with; copy it again or {REBUILD}")
    try:
        frame = pl.read_parquet(io.BytesIO(data))
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path} is not a Parquet file ({error}); {REBUILD}") from error
    missing = [name for name in ("item_id", "train_count") if name not in frame.columns]
    if missing:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}; {REBUILD}")
    if len(frame) != manifest.num_items:
        raise DataError(
            f"{path} must have {manifest.num_items} rows, as the manifest says, has {len(frame)}; {REBUILD}"
        )
    return frame


def _read_embeddings(storage: Storage, manifest: Manifest) -> np.ndarray | None:
    path = storage.path(EMBEDDINGS_NAME)
    if not storage.exists(EMBEDDINGS_NAME):
        if manifest.embedding is not None:
            raise DataError(f"{path} is missing; copy it again or {REBUILD}")
        return None
    try:
        if storage.is_local:
            embeddings = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            embeddings = np.load(io.BytesIO(storage.read(EMBEDDINGS_NAME)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is not a plain NumPy array ({error}); {REBUILD}") from error
    _check_embeddings(embeddings, manifest.num_items, path)
    return embeddings


def _check_embeddings(embeddings: np.ndarray, num_items: int, path: str) -> None:
    shape, dtype = embeddings.shape, embeddings.dtype
    if len(shape) != 2 or shape[0] != num_items or dtype not in (np.float16, np.float32):
        raise DataError(
            f"{path} must hold one float16 or float32 vector for each of {num_items} items, is {dtype} "
            f"{shape}; give the build a matrix in the order of the item table"
        )
    sample = np.linspace(0, num_items - 1, min(num_items, FINITE_SAMPLE_ROWS)).astype(np.int64)
    bad = ~np.isfinite(embeddings[sample]).all(axis=1)
    if bad.any():
        raise DataError(
            f"{path}: {int(bad.sum())} of {len(sample)} sampled item vectors are not finite, the first at "
            f"row {sample[bad.argmax()]}; mend the matrix and {REBUILD}"
        )
