"""The values of a column whose rows hold one each, or lists of them, however deep."""

import polars as pl

ROW, VALUE = "row", "value"


def unnested(values: pl.Series) -> pl.DataFrame:
    """A line for each value: `row` and `value`. Example: ["a", ["b"]] as row 0 gives two lines of row 0."""
    lines = pl.DataFrame({VALUE: values}).with_row_index(ROW)
    while isinstance(lines.schema[VALUE], pl.List | pl.Array):
        lines = lines.explode(VALUE)
    return lines


def distinct_texts(lines: pl.DataFrame) -> pl.DataFrame:
    """The lines as text, in order, without those that say nothing or say again what their row has said."""
    return lines.with_columns(pl.col(VALUE).cast(pl.String)).drop_nulls().unique(maintain_order=True)
