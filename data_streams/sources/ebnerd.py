"""EB-NeRD, the news recommendation data of Ekstra Bladet: whole pages with what was shown, clicked and read.

--path names the folder that ebnerd_demo.zip, ebnerd_small.zip or ebnerd_large.zip unpacks to (or one of the .zip):

- train/behaviors.parquet and validation/behaviors.parquet (or behaviors.parquet alone): impressions
- train/history.parquet and validation/history.parquet (or history.parquet): clicks of the three weeks before
- articles.parquet: titles, categories, topics (may be missing; items are then called by their ids)

An impression is a page: an `exposure` for each article in view and a `click` for each clicked one, with the seconds it
was read where one was clicked. `position` counts the articles as the file lists them; the owner lists them in no
telling order, so it is not the place on the screen. Clicks of the history come without a page. Who is in both
histories has that of train alone, since the one of validation repeats the clicks of train. Event columns: `session_id`,
`device_type` and `page_article`, the article under which the page was shown (-1: the front page).

Impressions of the hidden test set have no clicks; neither they nor their histories are read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from data_streams import schema
from data_streams.origins import Origin
from data_streams.raw_files import RawFiles, in_batches, require_columns
from data_streams.sources import Part, Source

ORIGINS = (
    Origin(
        name="ebnerd",
        home="https://recsys.eb.dk",
        by_hand="accept the terms of use on the page, download ebnerd_demo.zip, ebnerd_small.zip or "
        "ebnerd_large.zip from there, unpack it",
    ),
)
ROWS_PER_BATCH = 20_000
EVENTS_PER_IMPRESSION = 12
NEEDED = ("impression_id", "user_id", "impression_time", "article_ids_inview", "article_ids_clicked")
HISTORY_NEEDED = ("user_id", "impression_time_fixed", "article_id_fixed", "read_time_fixed")
PROFILE = ("gender", "postcode", "age", "is_sso_user", "is_subscriber")
FEATURES = ("session_id", "device_type", "page_article")
ARTICLE_COLUMNS = ("subtitle", "published_time", "article_type", "premium", "sentiment_label")


class EbnerdSource(Source):
    """One impression, one page."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        path: str
        """Folder or .zip of the official Parquet files."""
        history: bool = True
        """Read the clicks before the first impression too."""

        def build(self) -> "EbnerdSource":
            return EbnerdSource(self)

    def __init__(self, config: Config):
        self.config = config
        self.files = RawFiles(config.path)
        self.behaviors = _without_test(self.files.require("behaviors.parquet"))
        histories = _without_test(self.files.find("history.parquet")) if config.history else []
        self.histories = sorted(histories, key=lambda name: not name.endswith("train/history.parquet"))
        """A user's clicks are those of the first one that has the user."""

    def describe(self) -> Mapping[str, Any]:
        return {"name": "ebnerd", **asdict(self.config)}

    def parts(self) -> list[Part]:
        return [
            Part(name=name, start=group, stop=group + 1)
            for name in (*self.histories, *self.behaviors)
            for group in range(self._num_groups(name))
        ]

    def estimate_num_events(self) -> int:
        impressions = 0
        for name in self.behaviors:
            with self._open(name) as file:
                impressions += file.metadata.num_rows
        return impressions * EVENTS_PER_IMPRESSION

    def read(self, part: Part) -> Iterator[pl.DataFrame]:
        """A part is a row group."""
        is_history = part.name in self.histories
        read, needed = (_clicks_before, HISTORY_NEEDED) if is_history else (_pages, NEEDED)
        earlier = self._users_before(part.name) if is_history else None
        with self._open(part.name) as file:
            names = file.schema_arrow.names
            require_columns(names, list(needed), f"{self.config.path}/{part.name}")
            known = {*NEEDED, *HISTORY_NEEDED, *FEATURES, "article_id", "next_read_time"}
            columns = [name for name in names if name in known]
            batches = file.iter_batches(ROWS_PER_BATCH, row_groups=[part.start], columns=columns)
            yield from in_batches(read(_without_users(pl.from_arrow(batch), earlier)) for batch in batches)

    def items(self) -> pl.DataFrame | None:
        name = self.files.only("articles.parquet")
        if name is None:
            return None
        with self._open(name) as file:
            names = file.schema_arrow.names
            require_columns(names, ["article_id", "title"], f"{self.config.path}/{name}")
            kept = ("article_id", "title", "category_str", "topics", *ARTICLE_COLUMNS)
            table = pl.from_arrow(file.read([column for column in kept if column in names]))
        grouped = [
            pl.concat_list(column).fill_null([]) for column in ("category_str", "topics") if column in names
        ]
        categories = pl.concat_list(*grouped) if grouped else pl.lit([], dtype=pl.List(pl.String))
        return schema.normalise_items(
            table.with_columns(categories=categories).drop("category_str", "topics", strict=False),
            f"the articles {name}",
            item_column="article_id",
            title_column="title",
            categories_column="categories",
        )

    def takes_items_of_events(self) -> bool:
        return True

    def users(self) -> pl.DataFrame | None:
        """What the first impression of a user says about it."""
        found = []
        for name in self.behaviors:
            with self._open(name) as file:
                columns = [column for column in PROFILE if column in file.schema_arrow.names]
                found.append(pl.from_arrow(file.read(["user_id", *columns])).unique("user_id", keep="first"))
        table = pl.concat(found, how="diagonal").unique("user_id", keep="first", maintain_order=True)
        return schema.normalise_users(table, f"the users of {self.config.path}", user_column="user_id")

    def _users_before(self, history: str) -> pl.DataFrame | None:
        """The users of the histories before this one; None where it is the first."""
        found = []
        for name in self.histories[: self.histories.index(history)]:
            with self._open(name) as file:
                require_columns(file.schema_arrow.names, list(HISTORY_NEEDED), f"{self.config.path}/{name}")
                found.append(pl.from_arrow(file.read(["user_id"])))
        return pl.concat(found).unique() if found else None

    def _num_groups(self, name: str) -> int:
        with self._open(name) as file:
            return file.num_row_groups

    def _open(self, name: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.files.open(name), pre_buffer=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{self.config.path}/{name} cannot be read: {error}; fetch it again") from error


def _without_test(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith("test/") and "/test/" not in name]


def _without_users(rows: pl.DataFrame, users: pl.DataFrame | None) -> pl.DataFrame:
    return rows if users is None else rows.join(users, on="user_id", how="anti", maintain_order="left")


def _pages(impressions: pl.DataFrame) -> pl.DataFrame:
    """The exposures of each impression and behind them its clicks."""
    features = [
        (pl.col(source) if source in impressions.columns else pl.lit(None)).cast(pl.Int64).alias(name)
        for name, source in zip(FEATURES, ("session_id", "device_type", "article_id"), strict=True)
    ]
    read = pl.col("next_read_time") if "next_read_time" in impressions.columns else pl.lit(None)
    # The time of reading belongs to the click; of several it is not said to which.
    only = pl.col("article_ids_clicked").list.len() == 1
    common = impressions.select(
        "user_id",
        "impression_time",
        *features,
        "article_ids_inview",
        "article_ids_clicked",
        page_id="impression_id",
        read=pl.when(only).then(read),
    )
    position = pl.int_ranges(pl.col("article_ids_inview").list.len(), dtype=pl.Int32)
    shown = common.with_columns(position=position, item_id="article_ids_inview").explode(
        "position", "item_id"
    )
    shown = shown.with_columns(action=pl.lit(schema.EXPOSURE), play_time_s=pl.lit(0.0))
    clicked = common.with_columns(item_id="article_ids_clicked").explode("item_id")
    places = shown.select("page_id", "user_id", "item_id", "position").unique(
        ["page_id", "user_id", "item_id"], keep="first"
    )
    clicked = clicked.join(places, on=["page_id", "user_id", "item_id"], how="left", maintain_order="left")
    clicked = clicked.with_columns(action=pl.lit("click"), play_time_s=pl.col("read").cast(pl.Float64))
    together = pl.concat([shown, clicked.select(shown.columns)]).drop(
        "article_ids_inview", "article_ids_clicked"
    )
    return _normalise(together.drop_nulls("item_id"))


def _clicks_before(histories: pl.DataFrame) -> pl.DataFrame:
    rows = histories.select(
        "user_id",
        impression_time="impression_time_fixed",
        item_id="article_id_fixed",
        play_time_s=pl.col("read_time_fixed").cast(pl.List(pl.Float64)),
    ).explode(pl.exclude("user_id"))
    missing = [pl.lit(None, dtype=pl.Int64).alias(name) for name in FEATURES]
    rows = rows.with_columns(
        *missing,
        action=pl.lit("click"),
        page_id=pl.lit(None, dtype=pl.UInt32),
        position=pl.lit(None, dtype=pl.Int32),
    )
    return _normalise(rows.drop_nulls("item_id"))


def _normalise(events: pl.DataFrame) -> pl.DataFrame:
    names = ("user_id", "item_id", "action", "page_id", "position", "play_time_s")
    return schema.normalise_events(
        events,
        {**{name: name for name in names}, "timestamp_s": "impression_time"},
        feature_columns=FEATURES,
    )
