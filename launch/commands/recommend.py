"""Show or write recommendations of a run: grail recommend RUN_DIR --users 3 | --user-ids A B | --all --out FILE"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.configuration import ClusterConfig
from cluster.errors import ConfigError, DataError
from cluster.storage import renamed_at_end
from launch.progress import start_console
from launch.run_directory import local_file, require_ending
from launch.served_run import DataOptions, ServingOptions, find_step, parse_served
from trainer.configuration import PretrainConfig, SearchConfig

CATEGORIES = "categories"
SHOWN_USERS = 3


@dataclass(frozen=True, kw_only=True)
class RecommendOptions:
    """Show or write recommendations of a run."""

    users: int | None = None
    """How many users are shown, with their history and titles; left out, 3."""
    user_ids: tuple[str, ...] = ()
    """The users that are shown, by the ids of the data, in place of the first ones."""
    all: bool = False
    """Recommend to every user and write the result to a file instead."""
    out: str = ""
    """Parquet file for --all, or for the users of --user-ids: user_id, rank, item_id, title, score."""
    k: int = 10
    """Recommendations per user."""
    condition: tuple[str, ...] = ()
    """Conditions on the items, as COLUMN=VALUE with a column of the item table (such as category=Shampoos); several of
    one column are searched together. A model trained for the column is asked, the lists of others are filtered."""
    checkpoint: str = "best"
    """latest, best or the number of a step."""
    data: DataOptions = field(default_factory=DataOptions)
    evaluation: ServingOptions = field(default_factory=ServingOptions)
    search: SearchConfig = field(default_factory=SearchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def run(arguments: list[str]) -> int:
    config, options = parse_served("recommend", arguments, RecommendOptions)
    _check_who(options)
    users = SHOWN_USERS if options.users is None else options.users
    if options.k < 1 or users < 1:
        raise ConfigError(f"--k and --users must be at least 1, got {options.k} and {users}")
    config = under_conditions(config, options.condition)
    rows = _rows(config, options.user_ids)
    if options.out:
        write_all(config, options.out, rows, checkpoint=options.checkpoint, k=options.k)
    else:
        num_users = len(rows or ()) or users
        show(config, rows, num_users=num_users, checkpoint=options.checkpoint, k=options.k)
    return 0


def _check_who(options: RecommendOptions) -> None:
    if options.all and options.user_ids:
        raise ConfigError("--all is for every user and --user-ids for some; give one of them")
    if options.users is not None and (options.all or options.user_ids):
        raise ConfigError(
            "--users is how many of the first users are shown, and --all or --user-ids say which; leave one out"
        )
    if options.all != bool(options.out) and not options.user_ids:
        raise ConfigError(
            "--all needs --out FILE.parquet to write to, and --out is for --all or --user-ids; give both or none"
        )
    if options.out:
        require_ending(options.out, ".parquet", "--out")


def _rows(config: PretrainConfig, names: tuple[str, ...]) -> list[int] | None:
    """User rows of raw ids, each once; None where no user is named."""
    if not names:
        return None
    from launch.jobs import user_rows

    return user_rows(config.data.path, list(dict.fromkeys(names)))


def under_conditions(config: PretrainConfig, conditions: tuple[str, ...]) -> PretrainConfig:
    """The configuration whose search looks for items that meet the conditions.

    Raises: ConfigError where they are not of the form COLUMN=VALUE with one column, or no item meets one of them.
    """
    if not conditions:
        # What a run was validated under needs a held-out item, and here is none.
        named = bool(config.evaluation.conditions)
        return config if named else replace(config, evaluation=replace(config.evaluation, condition="none"))
    parts = [condition.partition("=") for condition in conditions]
    from data_streams.item_conditions import ItemConditions
    from data_streams.item_table import item_columns

    columns = {column for column, _, _ in parts}
    if "category" in columns and "category" not in item_columns(config.data.path):
        columns = columns - {"category"} | {CATEGORIES}
    if not all(equals and value for _, equals, value in parts) or len(columns) != 1:
        raise ConfigError(
            f"--condition must be COLUMN=VALUE, several of them with one column, got {' '.join(conditions)}"
        )
    (column,) = columns
    known = ItemConditions.load(config.data.path, column)
    for _, _, value in parts:
        known.find(value)
    trained = getattr(config.model, "condition_column", "") == column
    evaluation = replace(
        config.evaluation,
        condition="attention" if trained else "filter",
        condition_column=column,
        conditions=tuple(value for _, _, value in parts),
    )
    return replace(config, evaluation=evaluation)


def show(
    config: PretrainConfig,
    rows: list[int] | None = None,
    *,
    num_users: int,
    checkpoint: str = "best",
    k: int = 10,
) -> None:
    """Print history and recommendations of the users of some rows, or of the first ones."""
    from rich.console import Console

    from cluster.workers import run_workers
    from launch.jobs import show_job

    start_console()
    shown = run_workers(
        *(show_job, config, find_step(config, checkpoint), num_users, rows, k),
        config=config.cluster,
        run_dir=config.run_dir,
    )
    _tell_missing(rows, len(shown), config.data.path)
    console = Console()
    for user in shown:
        console.print(_user_table(user))


def write_all(
    config: PretrainConfig,
    out: str,
    rows: list[int] | None = None,
    *,
    checkpoint: str = "best",
    k: int = 10,
) -> None:
    """Write recommendations for every user, or those of some rows; workers write parts, which are merged in order."""
    from cluster.workers import run_workers
    from launch.jobs import part_file, write_job

    start_console()
    out = local_file(out, "--out")
    if Path(out).is_dir():
        raise ConfigError(f"--out must be a file, and {out} is a folder; name a file in it")
    parts = [part_file(out, rank) for rank in range(config.cluster.workers)]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    try:
        num_rows = run_workers(
            *(write_job, config, find_step(config, checkpoint), out, rows, k),
            config=config.cluster,
            run_dir=config.run_dir,
        )
        there = [part for part in parts if os.path.exists(part)]
        _require_rows(there, num_rows, out)
        num_users = _merge(there, config.data.path, out) if num_rows else 0
        _tell_missing(rows, num_users, config.data.path)
    finally:
        for part in parts:
            Path(part).unlink(missing_ok=True)
    print(f"Recommendations for {num_users:,} users written to {out}")


def _tell_missing(rows: list[int] | None, num_found: int, data_path: str) -> None:
    """Say how many of the named users get nothing. Raises: DataError where nobody gets anything."""
    if not num_found:
        raise DataError(
            f"users must have a history, and there must be items they have not taken, to get recommendations, and "
            f"that is so for {'none of the named ones' if rows else 'nobody'} in {data_path}; name others, or say "
            "--evaluation.no-filter-seen"
        )
    if rows and num_found < len(rows):
        print(
            f"{len(rows) - num_found} of the {len(rows)} named users have no history, or no item is left for them, and "
            "get nothing."
        )


def _require_rows(parts: list[str], wanted: int, out: str) -> None:
    """Raises: ConfigError where parts of other hosts are not to be seen here."""
    import pyarrow.parquet as pq

    found = sum(pq.ParquetFile(part).metadata.num_rows for part in parts)
    if found != wanted:
        raise ConfigError(
            f"--out must lie in a folder that all hosts share: workers wrote {wanted:,} rows beside {out}, and "
            f"{found:,} of them are there; name another folder"
        )


def _merge(parts: list[str], data_path: str, out: str) -> int:
    """Join rows with raw ids and titles, sorted by user; streamed, and there under its name only when whole."""
    import polars as pl

    from data_streams.item_table import ItemTable
    from launch.jobs import user_ids

    items = ItemTable.load(data_path)
    item_frame = pl.LazyFrame({"item_id": items.item_ids, "title": items.titles}).with_row_index("item_row")
    rows = pl.scan_parquet(parts).with_columns(pl.col("item_row", "user_row").cast(pl.UInt32))
    users = user_ids(data_path)
    known = rows.select("user_row").unique() if users is None else pl.LazyFrame({"user_id": users})
    user_frame = (
        known.with_columns(user_id=pl.col("user_row")) if users is None else known.with_row_index("user_row")
    )
    joined = (
        rows.join(item_frame, on="item_row", how="left")
        .join(user_frame, on="user_row", how="left")
        .sort("user_row", "rank")
        .select("user_id", "rank", "item_id", "title", "score")
    )
    with renamed_at_end(out) as temporary:
        joined.sink_parquet(temporary)
    return rows.select(pl.col("user_row").n_unique()).collect().item()


def _user_table(user: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from data_streams.item_table import shown_title

    table = Table(title=f"user {escape(user['user'])}, {user['num_events']} events", title_justify="left")
    table.add_column("latest history, oldest first", overflow="fold")
    table.add_column("recommended", overflow="fold")
    table.add_column("score", justify="right")
    for index in range(max(len(user["history"]), len(user["recommended"]))):
        past = user["history"][index] if index < len(user["history"]) else ""
        title, score = user["recommended"][index] if index < len(user["recommended"]) else ("", None)
        table.add_row(
            escape(shown_title(past)), escape(shown_title(title)), "" if score is None else f"{score:.3f}"
        )
    return table
