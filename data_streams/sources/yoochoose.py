"""YooChoose (RecSys Challenge 2015): clicks and purchases of sessions of a shop; a session is a user.

--path names a folder that holds, as unpacked from yoochoose-data.7z,

- yoochoose-clicks.dat: session, time, item, category
- yoochoose-buys.dat: session, time, item, price, quantity (may be missing)

Purchases are kept as events of the action `purchase`; sequences are made of clicks, as published. The event column
`category` is the context of a click: 0 missing, 1 to 12 a category, 13 a special offer (S), larger numbers a brand.

As GRU4Rec published it: --split by-session --test-days 1 --valid-days 1 --min-user-events 2 --min-item-events 5
--filter-passes 1, and --fraction 1/64 or 1/4 for the published parts. (A published part counts the training
sequences after they were cut into prefixes, here it counts sessions.)
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import polars as pl

from cluster.errors import ConfigError, DataError
from data_streams import schema
from data_streams.origins import Origin
from data_streams.raw_files import RawFiles, in_batches, parse_csv
from data_streams.sources import Part, Source

ORIGINS = (
    Origin(
        name="yoochoose",
        home="https://2015.recsyschallenge.com/challenge.html",
        by_hand="download yoochoose-data.7z (https://s3-eu-west-1.amazonaws.com/yc-rdata/yoochoose-data.7z, or from "
        "the challenge's page where that address no longer answers), unpack it with 7z x yoochoose-data.7z",
    ),
)
CLICKS, BUYS = "yoochoose-clicks.dat", "yoochoose-buys.dat"
COLUMNS = {
    CLICKS: {"session": pl.Int64, "time": pl.String, "item": pl.Int64, "category": pl.String},
    BUYS: {"session": pl.Int64, "time": pl.String, "item": pl.Int64, "price": pl.Int64, "quantity": pl.Int64},
}
ACTIONS = {CLICKS: "click", BUYS: "purchase"}
SPECIAL_OFFER = 13
BYTES_PER_ROW = 44
DAY_S = 86_400


class YooChooseSource(Source):
    """A session is a user."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        path: str
        """Folder of yoochoose-clicks.dat and yoochoose-buys.dat."""
        fraction: str = "1"
        """Keep this share of the sessions that end before the last day, the latest of them, such as 1/64 or 1/4."""

        def build(self) -> "YooChooseSource":
            return YooChooseSource(self)

    def __init__(self, config: Config):
        self.config = config
        self.files = RawFiles(config.path)
        self.logs = [*self.files.require(CLICKS), *self.files.find(BUYS)]
        share = _share(config.fraction)
        self.kept = None if share == 1 else self._latest_sessions(share)

    def describe(self) -> Mapping[str, Any]:
        return {"name": "yoochoose", **asdict(self.config)}

    def parts(self) -> list[Part]:
        return [part for name in self.logs for part in self.files.parts(name)]

    def estimate_num_events(self) -> int:
        return sum(self.files.num_bytes(name) for name in self.logs) // BYTES_PER_ROW

    def read(self, part: Part) -> Iterator[pl.DataFrame]:
        yield from in_batches(self._events(block, part.name) for block in self.files.blocks(part))

    def _events(self, block: bytes, name: str) -> pl.DataFrame:
        rows = _parse(block, name)
        if self.kept is not None:
            rows = rows.filter(pl.Series(np.isin(rows["session"].fill_null(-1).to_numpy(), self.kept)))
        file = name.rsplit("/", 1)[-1]
        category = pl.lit(0) if file == BUYS else pl.col("category").replace("S", str(SPECIAL_OFFER))
        return schema.normalise_events(
            rows.with_columns(category=category.cast(pl.Int64, strict=False), action=pl.lit(ACTIONS[file])),
            {"user_id": "session", "item_id": "item", "timestamp_s": "time", "action": "action"},
            order_column="time_ms",
            feature_columns=("category",),
        )

    def sequence_actions(self) -> tuple[str, ...]:
        return ("click",)

    def _latest_sessions(self, share: Fraction) -> np.ndarray:
        """Sessions that are kept, rising: those of the last day and the latest of those before it.

        Cost: one pass over the clicks; 16 bytes for each of the 9 million sessions.
        """
        ends = None
        for part in self.files.parts(self.logs[0]):
            for block in self.files.blocks(part):
                last = _parse(block, part.name).group_by("session").agg(pl.col("time_ms").max())
                together = last if ends is None else pl.concat([ends, last])
                ends = together.group_by("session").agg(pl.col("time_ms").max())
        if ends is None:
            raise DataError(
                f"{self.config.path}/{self.logs[0]} must hold clicks, but is empty; unpack it again"
            )
        ends = ends.drop_nulls().sort("time_ms", "session")
        last_day = pl.col("time_ms") >= ends["time_ms"].max() - DAY_S * 1_000
        early = ends.filter(~last_day)
        kept = pl.concat([early.tail(math.ceil(early.height * share)), ends.filter(last_day)])
        return kept["session"].sort().to_numpy()


def _parse(block: bytes, name: str) -> pl.DataFrame:
    """With the milliseconds of each row, since several clicks may lie in one second."""
    rows = parse_csv(block, COLUMNS[name.rsplit("/", 1)[-1]], where=name)
    time = pl.col("time").str.slice(0, 23).str.to_datetime("%Y-%m-%dT%H:%M:%S%.3f", strict=False)
    return rows.with_columns(time_ms=time.dt.epoch("ms"))


def _share(text: str) -> Fraction:
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise ConfigError(f"--fraction must be a share above 0 and up to 1, such as 1/64, given {text!r}")
    return share
