"""The table of users of a data set: raw ids and what else the source tells, by user row."""

from collections.abc import Sequence

import polars as pl

from cluster.storage import Storage

USERS_NAME = "users.parquet"


def read_users(
    storage: Storage, columns: Sequence[str] | None = None, *, num_rows: int | None = None
) -> pl.DataFrame | None:
    """The first `num_rows` users, or all of them; None where the data set has no such table.

    Nothing but the asked-for columns is read.
    """
    if not storage.exists(USERS_NAME):
        return None
    with storage.filesystem.open(storage.path(USERS_NAME), "rb") as file:
        return pl.read_parquet(file, columns=columns, n_rows=num_rows)
