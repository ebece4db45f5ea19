"""Made-up users with the lengths of MovieLens-1M, as shards of the project."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from data_streams.build import BuildConfig, build
from data_streams.sources.events import EventsSource

HELD_OUT = 3
"""Events of a user beside the inputs: the last target, and those of validation and test."""


@dataclass(frozen=True, kw_only=True)
class LongUsers:
    """Lengths are lognormal and cut to 20..longest; items are drawn by p(rank) ~ (rank + 100) ** -0.9."""

    num_users: int = 128
    num_items: int = 3_952
    log_mean: float = 4.56
    log_deviation: float = 0.9
    shortest: int = 20
    longest: int = 200
    seed: int = 0

    def lengths(self) -> np.ndarray:
        """Inputs of each user. Shapes: [U] int64."""
        drawn = np.random.default_rng(self.seed).lognormal(self.log_mean, self.log_deviation, self.num_users)
        return np.clip(drawn, self.shortest, self.longest).astype(np.int64)

    def items(self, count: int) -> np.ndarray:
        popularity = (np.arange(1, self.num_items + 1) + 100.0) ** -0.9
        random = np.random.default_rng(self.seed + 1)
        return random.choice(self.num_items, count, p=popularity / popularity.sum())

    def build(self, folder: Path) -> str:
        """Shards below `folder` -> their path."""
        lengths = self.lengths() + HELD_OUT
        events = pl.DataFrame(
            {
                "user_id": np.repeat(np.arange(self.num_users), lengths),
                "item_id": self.items(int(lengths.sum())),
                "place": np.arange(lengths.sum()),
            }
        )
        folder.mkdir(parents=True, exist_ok=True)
        events.write_parquet(folder / "events.parquet")
        pl.DataFrame({"item_id": np.arange(self.num_items)}).write_parquet(folder / "items.parquet")
        source = EventsSource.Config(
            events=(str(folder / "events.parquet"),),
            items=str(folder / "items.parquet"),
            order_column="place",
        )
        build(source, BuildConfig(out=str(folder / "shards"), ray="never"))
        return str(folder / "shards")
