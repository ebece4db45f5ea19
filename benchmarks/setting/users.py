"""Made-up users with the lengths and popularities of a small 5-core set, as shards of the project."""

from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.setting.benchmark import Scale
from data_streams.build import BuildConfig, build
from data_streams.sources.events import EventsSource

NUM_USERS = {"full": 22_363, "small": 100, "accelerator": 22_363}
NUM_ITEMS = {"full": 12_101, "small": 300, "accelerator": 12_101}
LONGEST_USER = 200
SEED = 0


def build_users(folder: Path, scale: Scale) -> str:
    """Shards below `folder` -> their path.

    A user has 5 + floor(x) events, x from a Lomax distribution of shape 2.5 and scale 6.3: 8.8 events on average,
    of which the last two are held out. Items are drawn by p(rank) ~ (rank + 100) ** -0.9, each independently.
    """
    random = np.random.default_rng(SEED)
    num_users, num_items = NUM_USERS[scale], NUM_ITEMS[scale]
    lengths = np.minimum(5 + np.floor(6.3 * random.pareto(2.5, num_users)).astype(np.int64), LONGEST_USER)
    popularity = (np.arange(1, num_items + 1) + 100.0) ** -0.9
    drawn = random.choice(num_items, lengths.sum(), p=popularity / popularity.sum())
    events = pl.DataFrame({"user_id": np.repeat(np.arange(num_users), lengths), "item_id": drawn})
    events = events.with_columns(pl.int_range(pl.len()).alias("place"))
    folder.mkdir(parents=True, exist_ok=True)
    events.write_parquet(folder / "events.parquet")
    pl.DataFrame({"item_id": np.arange(num_items)}).write_parquet(folder / "items.parquet")
    source = EventsSource.Config(
        events=(str(folder / "events.parquet"),), items=str(folder / "items.parquet"), order_column="place"
    )
    build(source, BuildConfig(out=str(folder / "shards"), ray="never"))
    return str(folder / "shards")
