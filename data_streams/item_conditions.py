"""Conditions that items meet, such as categories: the values of one column of the item table."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from cluster.errors import ConfigError, DataError
from cluster.plugins import suggestion
from data_streams.column_values import ROW, VALUE, distinct_texts, unnested
from data_streams.item_table import read_item_column

NO_CONDITION = -1


@dataclass(frozen=True, kw_only=True)
class ItemConditions:
    """Shapes: N items, m conditions of an item at most."""

    column: str
    names: list[str]
    """Name of each condition, sorted."""
    table: np.ndarray
    """[N, m] int32, conditions of each item, filled up with -1."""
    counts: np.ndarray
    """[number of conditions] int64, items that meet each."""

    @staticmethod
    def load(path: str, column: str) -> "ItemConditions":
        """Raises: ConfigError where the item table has no such column; DataError where it has no values."""
        return ItemConditions.of(column, read_item_column(path, column))

    @staticmethod
    def of(column: str, values: pl.Series) -> "ItemConditions":
        """Shapes: values [N] text, whole numbers or lists of them."""
        rows = unnested(values)
        if rows.schema[VALUE].is_float():
            raise ConfigError(
                f"conditions must be text, whole numbers or lists of them, and the item column {column} holds "
                f"{values.dtype}; name another column, or cut it into buckets first"
            )
        rows = distinct_texts(rows)
        if not rows.height:
            raise DataError(f"the item column {column} holds no values, so there is no condition to meet")
        names = rows[VALUE].unique().sort()
        code = rows.join(pl.DataFrame({VALUE: names}).with_row_index("code"), on=VALUE, maintain_order="left")
        item, condition = (code[name].to_numpy().astype(np.int64) for name in (ROW, "code"))
        sizes = np.bincount(item, minlength=len(values))
        table = np.full((len(values), sizes.max()), NO_CONDITION, dtype=np.int32)
        order = np.argsort(item, kind="stable")
        place = np.arange(len(item)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        table[item[order], place] = condition[order]
        return ItemConditions(
            column=column,
            names=names.to_list(),
            table=table,
            counts=np.bincount(condition, minlength=len(names)),
        )

    def find(self, name: str) -> int:
        """The number of a condition. Raises: ConfigError where no item meets one of this name."""
        if name not in self.names:
            raise ConfigError(f"no item has the {self.column} '{name}'{suggestion(name, self.names)}")
        return self.names.index(name)

    def narrowest(self, items: np.ndarray) -> np.ndarray:
        """Of the conditions of each item the one that the fewest items meet, -1 for none. Shapes: [n] -> [n]."""
        own = self.table[items]
        counts = np.where(own < 0, np.iinfo(np.int64).max, self.counts[own])
        return own[np.arange(len(own)), counts.argmin(1)] if len(own) else np.zeros(0, dtype=np.int32)

    def met(self, lists: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Whether each item meets its list's condition; an empty slot does not. Shapes: [U, K], [U] -> [U, K]."""
        meets = (self.table[np.maximum(lists, 0)] == wanted[:, None, None]).any(-1)
        return (lists >= 0) & (meets | (wanted < 0)[:, None])
