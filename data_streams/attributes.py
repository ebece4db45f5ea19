"""What a data set says of items and users in columns, as ids of an unbounded vocabulary.

An id depends on the column's name and the value alone, so it stays the same when items, users or values are added.
"""

import hashlib
import logging
from collections.abc import Sequence

import numpy as np
import polars as pl
import torch

from cluster.errors import ConfigError, DataError
from cluster.plugins import suggestion
from cluster.storage import Storage
from data_streams.column_values import ROW, VALUE, distinct_texts, unnested
from data_streams.item_table import read_item_columns
from data_streams.jagged import Jagged
from data_streams.user_table import read_users

MOST_VALUES = 16
"""Values of a column that count for one item or user; further ones are left out."""
_BUCKETS_PER_DOUBLING = 2
_SMALLEST = 2.0**-20
"""Smaller sizes count as this."""
_ID_BITS = 62

logger = logging.getLogger(__name__)


def item_attributes(path: str, columns: Sequence[str]) -> Jagged:
    """Ids of the values of some columns of the item table, by item row. Shapes: [M] int64 in N rows.

    Raises: ConfigError where there is no such column, or it holds what is neither text, numbers nor lists of them;
    DataError where all of them are empty, or as `ItemTable.load`.
    """
    return attribute_ids(read_item_columns(path, columns), f"items of {path}")


def user_attributes(path: str, columns: Sequence[str], num_users: int) -> Jagged:
    """The same of the user table, by user row. Shapes: [M] int64 in `num_users` rows."""
    users = read_users(Storage(path))
    if users is None or len(users) != num_users:
        raise ConfigError(
            f"data.user-attributes need a table with one row for each of {num_users} users in {path}, and it has "
            f"{'none' if users is None else len(users)}; build the data again, or leave them out"
        )
    for name in columns:
        if name not in users.columns:
            raise ConfigError(
                f"the users of {path} have no column '{name}'{suggestion(name, users.columns)}; build the data with "
                "--users FILE where they have more"
            )
    return attribute_ids([users[name] for name in columns], f"users of {path}")


def attribute_ids(columns: Sequence[pl.Series], whose: str) -> Jagged:
    """Ids of the values of each row. Shapes: columns [N] each -> [M] int64 in N rows."""
    parts = [_column_ids(values) for values in columns]
    rows = np.concatenate([part[ROW].to_numpy() for part in parts]).astype(np.int64)
    ids = np.concatenate([part["id"].to_numpy() for part in parts])
    if not len(ids):
        raise DataError(
            f"the {whose} have no values in {', '.join(values.name for values in columns)}; name other columns"
        )
    order = np.argsort(rows, kind="stable")
    lengths = np.bincount(rows, minlength=len(columns[0]))
    return Jagged.from_lengths(torch.from_numpy(ids[order]), torch.from_numpy(lengths))


def _column_ids(values: pl.Series) -> pl.DataFrame:
    """A line for each row and distinct value: row, id."""
    lines = unnested(values)
    kind = lines.schema[VALUE]
    if kind.is_float():
        lines = lines.filter(pl.col(VALUE).is_finite()).with_columns(_bucket(pl.col(VALUE)))
    elif not (kind.is_integer() or kind in (pl.String, pl.Boolean, pl.Categorical, pl.Enum, pl.Null)):
        raise ConfigError(
            f"attributes must be text, numbers or lists of them, and the column {values.name} holds {values.dtype}; "
            "name another column, or cut it into buckets first"
        )
    lines = distinct_texts(lines)
    kept = lines.filter(pl.int_range(pl.len()).over(ROW) < MOST_VALUES)
    if len(kept) < len(lines):
        logger.warning(
            "The column %s has more than %d values in some rows; %d further ones are left out.",
            *(values.name, MOST_VALUES, len(lines) - len(kept)),
        )
    distinct = kept[VALUE].unique()
    ids = pl.Series([_id_of(values.name, value) for value in distinct], dtype=pl.Int64)
    known = pl.DataFrame({VALUE: distinct, "id": ids})
    return kept.join(known, on=VALUE, maintain_order="left").select(ROW, "id")


def _bucket(value: pl.Expr) -> pl.Expr:
    """Half powers of two, which need no look at the other values. Example: 9.5 and 10.9 share a bucket with 8.0, and
    0.2 and 0.24 with each other."""
    size = value.abs().clip(_SMALLEST).log(2) * _BUCKETS_PER_DOUBLING
    return value.sign().cast(pl.Int64).cast(pl.String) + "~" + size.floor().cast(pl.Int64).cast(pl.String)


def _id_of(column: str, value: str) -> int:
    digest = hashlib.blake2b(f"{column}={value}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> (64 - _ID_BITS)
