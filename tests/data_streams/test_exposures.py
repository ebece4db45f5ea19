"""Exposures around held-out events, by hand."""

import polars as pl
import pytest

from cluster.errors import ConfigError, DataError
from cluster.storage import Storage
from data_streams.build import build
from data_streams.build_config import BuildConfig
from data_streams.configuration import DataConfig
from data_streams.exposures import ExposureStream
from data_streams.manifest import Manifest
from data_streams.sources.events import EventsSource

PAGES = (
    (0, "ab", "a", ""),
    (1, "cd", "", ""),
    (2, "ef", "e", "e"),
    (3, "gh", "", ""),
    (4, "ij", "ij", "j"),
    (5, "k", "", ""),
)
"""page, what was shown, clicked, and bought; the last but one click is i, the last is j, on the same page."""


def build_pages(folder, **options):
    rows, time = [], 0
    for page, shown, clicked, bought in PAGES:
        for action, items in (("exposure", shown), ("click", clicked), ("purchase", bought)):
            for item in items:
                time += 1
                rows.append(("u", item, time, action, page))
    names = ["user_id", "item_id", "timestamp_s", "action", "page_id"]
    folder.mkdir(exist_ok=True)
    pl.DataFrame(rows, schema=names, orient="row").write_parquet(folder / "events.parquet")
    source = EventsSource.Config(events=(str(folder / "events.parquet"),))
    chosen = {"keep_exposures": True, "split_actions": ("click",), **options}
    build(source, BuildConfig(out=str(folder / "shards"), ray="never", **chosen))
    return str(folder / "shards")


def letters(items):
    return "".join(sorted(chr(ord("a") + item) for item in items))


def read(path, split, max_length=10):
    config = DataConfig(path=path, max_length=max_length)
    stream = ExposureStream(config, split=split, actions=("click", "purchase"), rank=0, world_size=1)
    return list(stream.batches())


@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_pages_since_the_last_click_are_candidates_with_their_answers(tmp_path, split):
    (batch,) = read(build_pages(tmp_path / "data"), split)
    # Items are numbered in the order of their names.
    assert letters(batch.histories.items.values.tolist()) == "ae"
    shown = batch.candidates[0].tolist()
    assert letters(shown) == "ghij"
    clicked, bought = (
        letters(item for item, yes in zip(shown, batch.answers[0, :, answer], strict=True) if yes)
        for answer in range(2)
    )
    assert (clicked, bought) == ("ij", "j")
    (short,) = read(tmp_path / "data" / "shards", split, max_length=1)
    assert letters(short.histories.items.values.tolist()) == "e"


def test_a_rank_without_users_has_empty_batches(tmp_path):
    config = DataConfig(path=build_pages(tmp_path / "data"))
    stream = ExposureStream(config, split="test", actions=("click",), rank=1, world_size=2)
    alone = ExposureStream(config, split="test", actions=("click",), rank=0, world_size=2)
    assert sorted(map(len, (list(stream.batches()), list(alone.batches())))) == [0, 1]
    empty = stream.empty_batch()
    assert empty.histories.num_users == 0 and empty.answers.shape == (0, 1, 1)


def test_only_split_actions_are_held_out_and_counted(tmp_path):
    from data_streams.item_table import ItemTable

    counts, histories = {}, {}
    for name, options in (("clicks", {}), ("all", {"split_actions": ()})):
        path = build_pages(tmp_path / name, **options)
        counts[name] = int(ItemTable.load(path).train_counts.sum())
        histories[name] = Manifest.load(Storage(path)).num_train_history_events
    # Clicks before the last but one: a, e. With purchases, i and j hold out the last two of a e E i j J: four train.
    assert counts == {"clicks": 2, "all": 4}
    # Purchases are in the histories of both.
    assert histories == {"clicks": 3, "all": 4}
    with pytest.raises(ConfigError, match="like are not"):
        build_pages(tmp_path / "likes", split_actions=("like",))


def test_shards_without_exposures_are_refused(tmp_path):
    path = build_pages(tmp_path / "data", keep_exposures=False)
    with pytest.raises(DataError, match="lacks exposure"):
        ExposureStream(DataConfig(path=path), split="test", actions=("click",), rank=0, world_size=1)
