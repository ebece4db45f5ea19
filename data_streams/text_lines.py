"""What a data set says in words: a line for each item, and one for each user of whom anything is known."""

from collections.abc import Sequence

import polars as pl

from cluster.errors import ConfigError
from cluster.storage import Storage
from data_streams.text_embeddings import TEXT_COLUMNS, item_texts, read_item_frame, written
from data_streams.user_table import read_users


def item_lines(path: str, columns: Sequence[str]) -> list[str]:
    """Each item as a line, as `item_texts` writes it, of the columns that are named and there.

    Raises: ConfigError where a column is none of text, or nothing is written about the items; DataError as
    `read_item_frame`.
    """
    unknown = [name for name in columns if name not in TEXT_COLUMNS]
    if unknown or not columns:
        raise ConfigError(
            f"model.text.columns must be some of {', '.join(TEXT_COLUMNS)}, got {', '.join(columns) or 'none'}"
        )
    frame = read_item_frame(path)
    named = [name for name in columns if name in frame.columns]
    lines = item_texts(frame.select(named))
    if not any(lines) or _only_ids(frame, named):
        raise ConfigError(
            f"the items of {path} must have text in {', '.join(columns)}, and there is none; build the data with "
            "titles (--items of the source events), or name other columns with --model.text.columns"
        )
    return lines


def _only_ids(items: pl.DataFrame, columns: Sequence[str]) -> bool:
    """Whether nothing is written but titles that are raw ids, as the build writes them where a source has none."""
    if "title" not in columns:
        return False
    titles = items["title"].cast(pl.String)
    are_ids = (titles.is_null() | (titles == items["item_id"].cast(pl.String))).all()
    return are_ids and not any(item_texts(items.select(name for name in columns if name != "title")))


def user_lines(path: str) -> list[str] | None:
    """What the user table says of each user beside the id; None where it says nothing of anybody.

    Example: "Age: 24. Gender: M. Occupation: technician".
    """
    users = read_users(Storage(path))
    if users is None:
        return None
    frame = users.drop("user_id", strict=False)
    labels = [name.replace("_", " ").capitalize() for name in frame.columns]
    lines = [
        ". ".join(f"{label}: {text}" for label, text in zip(labels, map(written, row), strict=True) if text)
        for row in frame.iter_rows()
    ]
    return lines if any(lines) else None
