"""The synthetic world as a source: every range of its users is made by itself, so it may be of any size."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from data_streams.sources import Part, Source
from data_streams.world import World, WorldConfig
from data_streams.world_history import Histories

USERS_PER_PART = 2_048
USERS_PER_BATCH = 512
EVENTS_PER_CLICK = 7
"""About how many exposures, clicks, carts and purchases come with a click."""
MAX_PAGES = 1_000_000
"""Pages of a user; page ids of different users never meet."""
CART_DELAY_S, PURCHASE_DELAY_S = 1, 2


class WorldSource(Source):
    """Exposures, clicks, carts and purchases of users whose utility is known."""

    @dataclass(frozen=True, kw_only=True)
    class Config(WorldConfig):
        def build(self) -> "WorldSource":
            return WorldSource(self)

    def __init__(self, config: WorldConfig):
        self.config = config
        self.world = World(config)

    def describe(self) -> Mapping[str, Any]:
        return {"name": "world", **asdict(self.config)}

    def parts(self) -> list[Part]:
        starts = range(0, self.config.num_users, USERS_PER_PART)
        return [
            Part(name="the world", start=start, stop=min(start + USERS_PER_PART, self.config.num_users))
            for start in starts
        ]

    def estimate_num_events(self) -> int:
        return int(self.config.num_users * self.config.mean_clicks * EVENTS_PER_CLICK)

    def read(self, part: Part) -> Iterator[pl.DataFrame]:
        for start in range(part.start, part.stop, USERS_PER_BATCH):
            user_ids = np.arange(start, min(start + USERS_PER_BATCH, part.stop))
            yield _as_events(self.world.histories(user_ids), user_ids, self.world.catalogue.duration_s)

    def items(self) -> pl.DataFrame:
        return self.world.catalogue.table()

    def sequence_actions(self) -> tuple[str, ...]:
        """Clicks only: carts and purchases repeat the item of the click they follow."""
        return ("click",)


def _as_events(histories: Histories, user_ids: np.ndarray, duration_s: np.ndarray) -> pl.DataFrame:
    """One row per exposure, click, cart and purchase, each user's in the order of time."""
    columns = histories.events
    user_id = user_ids[columns["row"]]
    looks = pl.DataFrame(
        {
            "user_id": user_id,
            "item_id": columns["item"],
            "page_id": user_id * MAX_PAGES + columns["page"],
            "position": columns["position"].astype(np.int32),
            "duration_s": duration_s[columns["item"]],
        }
    )
    watched = pl.Series(columns["play_time_s"])
    nothing = pl.lit(0.0, dtype=pl.Float32)
    rows = [
        looks.select(
            pl.all(), timestamp_s=pl.Series(time_s), action=pl.lit(action), play_time_s=spent
        ).filter(pl.Series(columns[mark]))
        for action, mark, time_s, spent in (
            ("exposure", "shown", columns["time_s"], nothing),
            ("click", "clicked", columns["click_time_s"], watched),
            ("cart", "carted", columns["click_time_s"] + CART_DELAY_S, nothing),
            ("purchase", "purchased", columns["click_time_s"] + PURCHASE_DELAY_S, nothing),
        )
    ]
    return pl.concat(rows).sort("user_id", "timestamp_s", maintain_order=True)
