"""Semantic IDs that others have published beside their data, as tables."""

from collections.abc import Sequence

import polars as pl

from cluster.errors import DataError
from data_streams.semantic_ids import SemanticIdTable, named

_USUAL_SIZE = 256


def read_published(
    path: str, item_ids: pl.Series, *, column: str | None = None, code_sizes: Sequence[int] = ()
) -> SemanticIdTable:
    """Read a Parquet file with `item_id` and a column of lists of codes, given as numbers or as text.

    Of text the number in it counts: "<b_70>" is code 70. `column` may be left out where one column holds lists.
    Left out, `code_sizes` are 256 per level, or as many as the largest code needs.

    Raises: DataError for a file that cannot be read or whose items or codes do not fit the catalogue.
    """
    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"published IDs must be a Parquet file, and {path} cannot be read: {error}"
        ) from error
    column = column or _only_list_column(frame, path)
    if column not in frame.columns or "item_id" not in frame.columns:
        raise DataError(
            f"{path} must have the columns item_id and {column}; it has {', '.join(frame.columns)}; name the "
            "column with --column"
        )
    codes = _numbers(frame, column, path)
    if not code_sizes:
        levels = int(codes.list.len().max() or 0)
        largest = [codes.list.get(level, null_on_oob=True).max() or 0 for level in range(levels)]
        code_sizes = [max(code + 1, _USUAL_SIZE) for code in largest]
    return SemanticIdTable.from_frame(
        pl.DataFrame({"item_id": frame["item_id"], "codes": codes}),
        item_ids,
        code_sizes=code_sizes,
        tokenizer={"name": "published", "column": column},
        name=path,
    )


def _only_list_column(frame: pl.DataFrame, path: str) -> str:
    found = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.List)]
    if len(found) != 1:
        raise DataError(
            f"{path} must have one column of codes, and its columns of lists are "
            f"{', '.join(found) or 'none'}; choose with --column NAME"
        )
    return found[0]


def _numbers(frame: pl.DataFrame, column: str, path: str) -> pl.Series:
    dtype = frame.schema[column]
    inner = dtype.inner if isinstance(dtype, pl.List) else None
    if inner is None or not (inner.is_integer() or inner == pl.String):
        raise DataError(
            f"{path} must hold lists of numbers or texts in {column}, and holds {dtype}; name another --column"
        )
    code = pl.element() if inner.is_integer() else pl.element().str.extract(r"(\d+)\D*$")
    numbers = frame.select(pl.col(column).list.eval(code.cast(pl.Int32, strict=False)))[column]
    is_bad = numbers.list.eval(pl.element().is_null().any()).list.first().fill_null(True)
    if is_bad.any():
        raise DataError(
            f"{path} must have a number below 2 ** 31 in every code of {column}; "
            f"{named(frame['item_id'].filter(is_bad))} have codes without one; mend the file"
        )
    return numbers
