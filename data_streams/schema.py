"""The one form all raw logs are brought into: events, items and users, with their names and types.

Events have a row per event, items and users a row per item and user. Ids are integers or text. Whatever a
source reads goes through `normalise_events`, `normalise_items` or `normalise_users`.
"""

import html
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import polars as pl

from cluster.errors import DataError
from data_streams.column_values import ROW, VALUE, unnested

MISSING = -1
"""Stands for an absent page, position or duration in the shards."""

LATEST_TIME_S = 10**11
"""Larger times (year 5138) are surely not in seconds."""

TIME_REST = r"^(?:[.,][0-9]+)?\s*(?:(?i:Z|UTC|GMT)|([+-])([01][0-9]|2[0-3])(?::?([0-5][0-9]))?)?$"
"""What may stand behind the seconds of a written time: a fraction, then Z, UTC or an offset from it."""

Kind = Literal["id", "time", "integer", "real", "text"]


@dataclass(frozen=True, kw_only=True)
class EventColumn:
    """One column of the event schema."""

    name: str
    kind: Kind
    meaning: str
    option: str
    """Command line option that names the column of the source."""
    aliases: tuple[str, ...] = ()
    required: bool = False


EVENT_COLUMNS = {
    column.name: column
    for column in (
        EventColumn(name="user_id", kind="id", meaning="who acted", option="--user-column", required=True),
        EventColumn(name="item_id", kind="id", meaning="on what", option="--item-column", required=True),
        EventColumn(
            name="timestamp_s",
            kind="time",
            meaning="when, in seconds since 1970",
            option="--timestamp-column",
            aliases=("timestamp",),
        ),
        EventColumn(name="action", kind="text", meaning="what was done", option="--action-column"),
        EventColumn(name="page_id", kind="id", meaning="the request it belongs to", option="--page-column"),
        EventColumn(name="position", kind="integer", meaning="place on the page", option="--position-column"),
        EventColumn(name="play_time_s", kind="real", meaning="time spent", option="--play-time-column"),
        EventColumn(name="duration_s", kind="real", meaning="length of the item", option="--duration-column"),
    )
}

INNER_NAMES = {
    *("order", "user_hash", "partition", "place"),
    *("user", "item", "offsets", "train_end", "valid_at", "test_at"),
}
"""Names of columns that builds and shards have beside those of the schema."""

DEFAULT_ACTION = "click"
EXPOSURE = "exposure"


def choose_columns(
    table: str, given: Collection[str], named: Mapping[str, str | None], needed: Collection[str] = ()
) -> dict[str, str]:
    """Schema name -> name in the source, for every event column that is there.

    `named` holds what a person asked for; the other columns are looked for under their schema names.

    Raises: DataError when a column that was asked for or is needed is not there.
    """
    chosen = {}
    for name, column in EVENT_COLUMNS.items():
        asked = named.get(name)
        if asked is not None and asked not in given:
            raise _missing_column(table, asked, column, given)
        candidates = (asked,) if asked is not None else (name, *column.aliases)
        found = [candidate for candidate in candidates if candidate in given]
        if found:
            chosen[name] = found[0]
        elif column.required or name in needed:
            raise _missing_column(table, name, column, given)
    return chosen


def _missing_column(table: str, wanted: str, column: EventColumn, given: Collection[str]) -> DataError:
    also = f" (or {', '.join(column.aliases)})" if column.aliases and wanted == column.name else ""
    return DataError(
        f"{table} must have a column {wanted!r}{also} that says {column.meaning}; its columns are "
        f"{', '.join(given)}; say which of them it is with {column.option} NAME"
    )


def normalise_events(
    frame: pl.DataFrame,
    columns: Mapping[str, str],
    *,
    time_unit: Literal["s", "ms", "us", "ns"] = "s",
    order_column: str | None = None,
    feature_columns: Collection[str] = (),
) -> pl.DataFrame:
    """Rename and cast to the schema; values that cannot be read become null.

    A column `order` is added where the order of a user's events is given by a column of its own.
    """
    casts = [
        _cast(pl.col(source), frame.schema[source], EVENT_COLUMNS[name].kind, time_unit).alias(name)
        for name, source in columns.items()
    ]
    if "action" not in columns:
        casts.append(pl.lit(DEFAULT_ACTION).alias("action"))
    if order_column is not None:
        casts.append(_cast_order(order_column, frame.schema[order_column]))
    casts += [_cast_feature(name, frame.schema[name]) for name in feature_columns]
    normalised = frame.select(casts).with_columns(pl.col("action").fill_null(DEFAULT_ACTION))
    _check_features(frame, normalised, feature_columns)
    if "timestamp_s" in columns:
        _check_seconds(normalised["timestamp_s"], columns["timestamp_s"])
    return normalised


def check_feature_names(names: Collection[str]) -> None:
    """Raises: DataError for a feature column that is named twice, or that would take the place of another column."""
    twice = {name for name in names if list(names).count(name) > 1}
    taken = sorted({name for name in names if name in EVENT_COLUMNS or name in INNER_NAMES} | twice)
    if taken:
        raise DataError(
            f"feature columns must have names of their own, and {', '.join(taken)} cannot be one of "
            f"{', '.join(names)}: a name is given twice, or a column of the data set is called so already; "
            "leave it out or rename the column"
        )


def _cast(value: pl.Expr, dtype: pl.DataType, kind: Kind, time_unit: str) -> pl.Expr:
    if kind == "id":
        return _cast_id(value, dtype)
    if kind == "time":
        return _cast_time(value, dtype, time_unit)
    if kind == "integer":
        return _cast_whole(value, dtype, pl.Int32)
    if kind == "real":
        real = value.cast(pl.Float32, strict=False)
        return pl.when(real.is_finite()).then(real)
    return value.cast(pl.String)


def _cast_whole(value: pl.Expr, dtype: pl.DataType, to: type[pl.DataType]) -> pl.Expr:
    """Text may have whole numbers as a table with gaps writes them: 3.0."""
    if not isinstance(dtype, pl.String):
        return value.cast(to, strict=False)
    text = value.str.strip_chars()
    real = text.cast(pl.Float64, strict=False)
    return pl.coalesce(
        text.cast(to, strict=False), pl.when(real == real.floor()).then(real).cast(to, strict=False)
    )


def _cast_id(value: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    if dtype.is_integer():
        return value.cast(pl.Int64, strict=False)
    if dtype.is_float() or dtype.is_nested() or dtype.is_temporal():
        raise DataError(
            f"ids must be integers or text, given {dtype}; convert the column {value.meta.output_name()!r}"
        )
    text = value.cast(pl.String).str.strip_chars()
    return pl.when(text == "").then(None).otherwise(text).alias(value.meta.output_name())


def _cast_time(value: pl.Expr, dtype: pl.DataType, time_unit: str) -> pl.Expr:
    if isinstance(dtype, (pl.Time, pl.Duration)):
        raise DataError(
            f"times must be dates, numbers or text, given {dtype}, which says no day; convert the column "
            f"{value.meta.output_name()!r}"
        )
    if dtype.is_temporal():
        return value.cast(pl.Datetime("us")).dt.epoch("s")
    divisor = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}[time_unit]
    if not isinstance(dtype, pl.String):
        return value.cast(pl.Int64, strict=False) // divisor
    # Nanoseconds have more digits than a float.
    number = pl.coalesce(
        value.cast(kind, strict=False).cast(pl.Int64, strict=False) for kind in (pl.Int64, pl.Float64)
    )
    return pl.coalesce(number // divisor, _written_time(value))


def _written_time(text: pl.Expr) -> pl.Expr:
    """Seconds since 1970 of a date and a time of day, in UTC where no offset stands behind; others become null."""
    local = text.str.slice(0, 19).str.replace("T", " ").str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False)
    rest = text.str.slice(19).str.strip_chars_end()
    hours, minutes = (rest.str.extract(TIME_REST, group).cast(pl.Int64).fill_null(0) for group in (2, 3))
    sign = pl.when(rest.str.extract(TIME_REST, 1) == "-").then(-1).otherwise(1)
    offset_s = sign * (3_600 * hours + 60 * minutes)
    return pl.when(rest.str.contains(TIME_REST)).then(local.dt.epoch("s") - offset_s)


def _cast_order(name: str, dtype: pl.DataType) -> pl.Expr:
    column = pl.col(name)
    if isinstance(dtype, pl.String):
        column = column.cast(pl.Float64, strict=False).fill_nan(None)
    elif dtype.is_float():
        column = column.fill_nan(None)
    elif dtype.is_nested():
        raise DataError(
            f"the order column {name!r} must hold numbers or times, given {dtype}; name another one"
        )
    return column.alias("order")


def _cast_feature(name: str, dtype: pl.DataType) -> pl.Expr:
    if not (dtype.is_integer() or isinstance(dtype, (pl.Boolean, pl.String))):
        raise DataError(
            f"the feature column {name!r} must hold whole numbers (categories already encoded), given "
            f"{dtype}; encode it first"
        )
    return _cast_whole(pl.col(name), dtype, pl.Int64)


def _check_features(given: pl.DataFrame, cast: pl.DataFrame, names: Collection[str]) -> None:
    """Text that is no whole number would become a missing value, all of it alike."""
    for name in names:
        if isinstance(given.schema[name], pl.String):
            text = given[name].filter(cast[name].is_null()).str.strip_chars()
            unread = text.filter((text != "") & ~text.str.to_lowercase().is_in(["nan", "null"]))
            if len(unread):
                raise DataError(
                    f"the feature column {name!r} must hold whole numbers (categories already encoded), given "
                    f"{unread[0]!r}; encode it first, and leave empty what is missing"
                )


def _check_seconds(times: pl.Series, name: str) -> None:
    latest = times.max()
    if latest is not None and latest > LATEST_TIME_S:
        raise DataError(
            f"times must be in seconds since 1970, but column {name!r} holds {latest}; "
            "say --time-unit ms, us or ns"
        )


def bad_rows(frame: pl.DataFrame) -> dict[str, pl.Series]:
    """Reason -> mask of the events that cannot be used for it."""
    required = [name for name in ("user_id", "item_id", "timestamp_s", "order") if name in frame.columns]
    masks = {f"events without {name}": frame[name].is_null() for name in required}
    return {reason: mask for reason, mask in masks.items() if mask.any()}


def normalise_items(
    frame: pl.DataFrame,
    table: str,
    *,
    item_column: str,
    title_column: str | None,
    categories_column: str | None,
) -> pl.DataFrame:
    """Items with item_id, title and categories in front, then the further columns as they were given.

    HTML entities in titles and categories are resolved. An item without a title is called by its id.

    Raises: DataError for a missing column, ids that are null, and ids that occur twice.
    """
    for name, option in ((item_column, "--item-column"), (title_column, "--title-column")):
        _require_table_column(frame, table, name, option)
    _require_table_column(frame, table, categories_column, "--categories-column")
    ids = _cast_id(pl.col(item_column), frame.schema[item_column]).alias("item_id")
    title = _title(frame, title_column)
    categories = _categories(frame, categories_column)
    known = {"item_id", "title", "categories", item_column, title_column, categories_column}
    further = [name for name in frame.columns if name not in known]
    items = frame.with_columns(ids, _grail_title=title, _grail_categories=categories).select(
        "item_id",
        pl.col("_grail_title").alias("title"),
        pl.col("_grail_categories").alias("categories"),
        *further,
    )
    _check_unique_ids(items["item_id"], table)
    return items.with_columns(pl.coalesce(pl.col("title"), pl.col("item_id").cast(pl.String)))


def _require_table_column(frame: pl.DataFrame, table: str, name: str | None, option: str) -> None:
    if name is not None and name not in frame.columns:
        raise DataError(
            f"{table} must have a column {name!r}; its columns are {', '.join(frame.columns)}; "
            f"say which of them it is with {option} NAME"
        )


def _check_unique_ids(ids: pl.Series, table: str) -> None:
    if ids.null_count():
        raise DataError(
            f"{table} must name every row by an id; {ids.null_count()} rows have none; remove them"
        )
    repeated = ids.filter(ids.is_duplicated()).unique().sort()
    if len(repeated):
        raise DataError(
            f"{table} must have one row per id; {len(repeated)} ids occur more than once, "
            f"such as {repeated[0]!r}; remove the repeated rows"
        )


def _title(frame: pl.DataFrame, column: str | None) -> pl.Series:
    if column is None:
        return pl.Series([None] * frame.height, dtype=pl.String)
    if frame.schema[column].is_nested():
        raise DataError(
            f"titles must be text, given {frame.schema[column]}; convert the column {column!r}, or name another one "
            "with --title-column"
        )
    titles = frame[column].cast(pl.String).str.strip_chars()
    titles = pl.select(pl.when(titles == "").then(None).otherwise(titles)).to_series()
    return _unescape(titles)


def _categories(frame: pl.DataFrame, column: str | None) -> pl.Series:
    """Names of the categories of each item, without repetition; nested lists (paths) are laid flat."""
    if column is None:
        return pl.Series([[]] * frame.height, dtype=pl.List(pl.String))
    categories = frame[column]
    if isinstance(categories.dtype, pl.String):
        categories = categories.str.split("|")
    rows = unnested(categories)
    rows = rows.with_columns(_unescape(rows[VALUE].cast(pl.String).str.strip_chars()).alias(VALUE))
    named = rows.filter(pl.col(VALUE).is_not_null() & (pl.col(VALUE) != ""))
    grouped = named.group_by(ROW, maintain_order=True).agg(pl.col(VALUE).unique(maintain_order=True))
    every = pl.DataFrame({ROW: range(frame.height)}, schema={ROW: rows.schema[ROW]})
    return every.join(grouped, on=ROW, how="left", maintain_order="left")[VALUE].rename("name").fill_null([])


def _unescape(texts: pl.Series) -> pl.Series:
    return pl.Series(
        [text if text is None or "&" not in text else html.unescape(text) for text in texts], dtype=pl.String
    )


def normalise_users(frame: pl.DataFrame, table: str, *, user_column: str) -> pl.DataFrame:
    """Users with user_id in front, then their profile columns as they were given.

    Raises: DataError for a missing column, ids that are null, and ids that occur twice.
    """
    _require_table_column(frame, table, user_column, "--user-column")
    ids = _cast_id(pl.col(user_column), frame.schema[user_column]).alias("user_id")
    profile = [name for name in frame.columns if name not in ("user_id", user_column)]
    users = frame.with_columns(ids).select("user_id", *profile)
    _check_unique_ids(users["user_id"], table)
    return users
