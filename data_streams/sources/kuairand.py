"""KuaiRand-Pure, -1K and -27K: exposures of short videos with all feedback, from the official CSV files.

--path names the folder that KuaiRand-Pure.tar.gz (or -1K, -27K) unpacks to, or its `data` folder:

- log_standard_*.csv, and with --random-exposures also log_random_*.csv
- user_features_*.csv, video_features_basic_*.csv (may be missing)

A row of a log is one video shown to a user. It becomes an `exposure` and, at the same moment, an event for each
feedback: click, long_view, like, follow, comment, forward, profile_enter, hate. (In feeds of one column `click` means a
valid play: more than 7 seconds, or to the end of a shorter video.) The time watched goes with the click, or with the
exposure where there was none; `duration_s` is the length of the video. Event columns `tab` and `is_rand` say where it
was shown and whether by chance. Clicks make up a sequence; --sequence-actions takes others, such as long_view.

The log names no pages. With --keep-exposures they are RECONSTRUCTED: what a user was shown in one tab without a
pause longer than --page-pause-s is one page, and `position` is the place of an exposure in it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from data_streams import schema
from data_streams.origins import Origin, OriginFile
from data_streams.pages import PageRule
from data_streams.raw_files import RawFiles, in_batches, parse_csv, read_table, require_columns
from data_streams.sources import Part, Source

RECORD = "10439422"
ORIGINS = tuple(
    Origin(
        name=f"kuairand-{size.lower()}",
        home="https://kuairand.com",
        files=(
            OriginFile(
                address=f"https://zenodo.org/records/{RECORD}/files/KuaiRand-{size}.tar.gz",
                checksum_address=f"https://zenodo.org/api/records/{RECORD}/files/KuaiRand-{size}.tar.gz",
            ),
        ),
    )
    for size in ("Pure", "1K", "27K")
)
ACTIONS = {
    "click": "is_click",
    "long_view": "long_view",
    "like": "is_like",
    "follow": "is_follow",
    "comment": "is_comment",
    "forward": "is_forward",
    "profile_enter": "is_profile_enter",
    "hate": "is_hate",
}
"""Action -> column of the log, in the order in which they follow an exposure."""
FEATURES = ("tab", "is_rand")
NEEDED = ("user_id", "video_id", "time_ms", "play_time_ms", "duration_ms", *ACTIONS.values(), *FEATURES)
BYTES_PER_ROW = 75
EVENTS_PER_ROW = 2


class KuaiRandSource(Source):
    """One row of the log is an exposure and the actions that answer it."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        path: str
        """Folder of the official CSV files."""
        random_exposures: bool = False
        """Read log_random_*.csv too: videos that were shown by chance, not by the recommender."""
        page_pause_s: float = 60.0
        """Pages are told apart by a pause of this many seconds (or another tab)."""

        def build(self) -> "KuaiRandSource":
            return KuaiRandSource(self)

    def __init__(self, config: Config):
        self.config = config
        self.files = RawFiles(config.path)
        patterns = ["log_standard_*.csv", *(["log_random_*.csv"] if config.random_exposures else [])]
        self.logs = [name for pattern in patterns for name in self.files.require(pattern)]

    def describe(self) -> Mapping[str, Any]:
        return {"name": "kuairand", **asdict(self.config)}

    def parts(self) -> list[Part]:
        return [
            part for name in self.logs for part in self.files.parts(name, len(self.files.first_line(name)))
        ]

    def estimate_num_events(self) -> int:
        return sum(self.files.num_bytes(name) for name in self.logs) * EVENTS_PER_ROW // BYTES_PER_ROW

    def read(self, part: Part) -> Iterator[pl.DataFrame]:
        # Saved again by a spreadsheet, the header begins with a mark, or is no UTF-8 at all.
        header = self.files.first_line(part.name).decode("utf-8-sig", errors="replace")
        columns = header.strip().split(",")
        require_columns(columns, list(NEEDED), f"{self.config.path}/{part.name}")
        types = dict.fromkeys(columns, pl.Int64)
        rows = (parse_csv(block, types, where=part.name) for block in self.files.blocks(part))
        yield from in_batches(_as_events(frame) for frame in rows)

    def items(self) -> pl.DataFrame | None:
        """Author, type, music and tags; the tags are the categories. Videos have no titles."""
        name = self.files.only("video_features_basic*.csv")
        if name is None:
            return None
        table = read_table(self.files, name, {"video_id": pl.Int64})
        require_columns(table.columns, ["video_id", "tag"], f"{self.config.path}/{name}")
        return schema.normalise_items(
            table.with_columns(tag=pl.col("tag").str.replace_all(",", "|")),
            f"the videos {name}",
            item_column="video_id",
            title_column=None,
            categories_column="tag",
        )

    def takes_items_of_events(self) -> bool:
        return True

    def users(self) -> pl.DataFrame | None:
        name = self.files.only("user_features*.csv")
        if name is None:
            return None
        table = read_table(self.files, name, {"user_id": pl.Int64})
        return schema.normalise_users(table, f"the users {name}", user_column="user_id")

    def sequence_actions(self) -> tuple[str, ...]:
        """Clicks only: the other actions repeat the video."""
        return ("click",)

    def page_rule(self) -> PageRule:
        return PageRule(pause_s=self.config.page_pause_s, columns=("tab",))


def _as_events(rows: pl.DataFrame) -> pl.DataFrame:
    """The exposure of each row and behind it its actions; ordered by milliseconds."""
    actions = pl.concat_list(
        pl.lit(schema.EXPOSURE),
        *(pl.when(pl.col(column) == 1).then(pl.lit(action)) for action, column in ACTIONS.items()),
    )
    events = rows.with_columns(action=actions.list.drop_nulls()).explode("action")
    watched = pl.when(pl.col("is_click") == 1).then(pl.lit("click")).otherwise(pl.lit(schema.EXPOSURE))
    seconds = pl.col("play_time_ms") / 1_000
    events = events.with_columns(
        play_time_s=pl.when(pl.col("action") == watched).then(seconds).otherwise(0.0),
        duration_s=pl.col("duration_ms") / 1_000,
    )
    names = ("user_id", "action", "play_time_s", "duration_s")
    return schema.normalise_events(
        events,
        {**{name: name for name in names}, "item_id": "video_id", "timestamp_s": "time_ms"},
        time_unit="ms",
        order_column="time_ms",
        feature_columns=FEATURES,
    )
