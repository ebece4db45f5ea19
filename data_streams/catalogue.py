"""The items of a build: which there are, in which rows, and the tables that are written of them."""

import hashlib
import io
from typing import Any

import numpy as np
import polars as pl

from cluster.errors import DataError
from cluster.storage import Storage
from data_streams import partition

EMBEDDING_BLOCK_ROWS = 65_536


class Catalogue:
    """Items in the order of their table, behind them those that only occur in events; some may be left out."""

    def __init__(self, storage: Storage, table: pl.DataFrame | None):
        """`table` is what the source knows of its items; None where it knows nothing."""
        self.storage = storage
        self.items = _with_items_of_events(storage, table)
        self.kept = np.ones(self.items.height, dtype=bool)
        self._write_index()

    @property
    def num_items(self) -> int:
        return int(self.kept.sum())

    def keep(self, kept: np.ndarray) -> None:
        """Leave out the items that are not marked and give the others new rows."""
        self.kept = kept
        self._write_index()

    def _write_index(self) -> None:
        """Raw id -> row for the tasks; -1 for an item that is left out."""
        rows = np.where(self.kept, np.cumsum(self.kept) - 1, partition.LEFT_OUT)
        rows = pl.Series("item", rows.astype(np.int32 if len(rows) < 2**31 else np.int64))
        partition.write_parquet(self.storage, partition.ITEM_INDEX, self.items.select("item_id", rows))

    def write_items(self) -> str:
        """Returns the checksum of the table, by which a checkpoint knows its catalogue again."""
        names = self.storage.list("tmp/train_counts")
        counts = np.zeros(self.num_items, dtype=np.int64)
        for name in names:
            part = partition.read_parquet(self.storage, f"tmp/train_counts/{name}")
            counts[part["item"].to_numpy()] += part["train_count"].to_numpy()
        items = self.items.filter(pl.Series(self.kept))
        front = items.select("item_id", "title", "categories").with_columns(train_count=counts)
        further = [name for name in items.columns if name not in front.columns]
        buffer = io.BytesIO()
        front.with_columns(items.select(further)).write_parquet(buffer)
        self.storage.write("items.parquet", buffer.getvalue())
        return hashlib.sha256(buffer.getvalue()).hexdigest()

    def write_embeddings(self, matrix: np.ndarray | None) -> dict[str, Any] | None:
        """Returns the manifest's entry. Raises: DataError when rows and items do not match."""
        if matrix is None:
            return None
        if len(matrix) != len(self.kept):
            raise DataError(
                f"embeddings must have one row per row of the item table: {len(self.kept)} are required, "
                f"{len(matrix)} are given; compute them for this table"
            )
        dtype = matrix.dtype if matrix.dtype in (np.float16, np.float32) else np.dtype(np.float32)
        rows = np.flatnonzero(self.kept)
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (len(rows), matrix.shape[1]),
        }
        with self.storage.filesystem.open(self.storage.path("item_embeddings.npy"), "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(rows), EMBEDDING_BLOCK_ROWS):
                block = matrix[rows[start : start + EMBEDDING_BLOCK_ROWS]]
                file.write(np.ascontiguousarray(block, dtype=dtype).tobytes())
        return {"file": "item_embeddings.npy", "dim": matrix.shape[1], "dtype": str(dtype)}


def _with_items_of_events(storage: Storage, table: pl.DataFrame | None) -> pl.DataFrame:
    names = storage.list("tmp/item_ids")
    if not names:
        return table
    ids = [partition.read_parquet(storage, f"tmp/item_ids/{name}")["item_id"] for name in names]
    found = pl.DataFrame({"item_id": pl.concat(ids).unique().sort()})
    if table is not None:
        found = found.with_columns(pl.col("item_id").cast(table.schema["item_id"]))
        found = found.join(table.select("item_id"), on="item_id", how="anti", maintain_order="left")
    unnamed = found.with_columns(
        title=pl.col("item_id").cast(pl.String), categories=pl.lit([], dtype=pl.List(pl.String))
    )
    return unnamed if table is None else pl.concat([table, unnamed], how="diagonal")
