"""What `grail data inspect` finds, and that it notices damage."""

import io

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from cluster.errors import ConfigError, DataError
from cluster.storage import Storage
from data_streams.build import BuildConfig, build
from data_streams.inspect import inspect
from data_streams.shards import Manifest
from data_streams.sources.events import EventsSource

EVENTS = pl.DataFrame(
    {
        "user_id": [7, 7, 7, 7, 8, 8],
        "item_id": [1, 2, 3, 2, 3, 3],
        "timestamp": [0, 86_400, 86_401, 200_000, 5, 6],
        "action": ["click", "cart", "click", "click", "click", "cart"],
    }
)
ITEMS = pl.DataFrame({"item_id": [1, 2, 3, 4], "title": ["Kettle", "Pan", "Mug", "Bowl"]})


@pytest.fixture
def data_set(tmp_path):
    EVENTS.write_parquet(tmp_path / "events.parquet")
    ITEMS.write_parquet(tmp_path / "items.parquet")
    source = EventsSource.Config(
        events=(str(tmp_path / "events.parquet"),), items=str(tmp_path / "items.parquet")
    )
    build(source, BuildConfig(out=str(tmp_path / "data")))
    return tmp_path / "data"


def test_the_report_counts_what_is_there(data_set):
    report = inspect(str(data_set))
    assert sorted(report.lengths.tolist()) == [2, 4]
    assert report.item_counts.tolist() == [1, 2, 3, 0]
    assert report.action_counts == {"click": 4, "cart": 2}
    assert report.day_counts == {0: 3, 1: 2, 2: 1}
    assert (report.num_validation, report.num_test) == (1, 1)
    assert dict(report.samples)["7"] == ["Kettle", "Pan", "Mug", "Pan"]


def test_the_report_is_printed_with_titles_and_plotted(data_set):
    report = inspect(str(data_set), num_samples=1)
    console = Console(file=io.StringIO(), width=120)
    console.print(report.render())
    text = console.file.getvalue()
    assert "2, 4, 6" in text
    assert "1970-01-01 to 1970-01-03" in text
    assert "all checksums right" in text
    assert "Mug" in text
    picture = (data_set / "inspect.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_a_user_is_shown_in_short_lines_that_tell_what_was_not_chosen(tmp_path):
    events = EVENTS.with_columns(action=pl.col("action").replace("cart", "exposure"))
    events.write_parquet(tmp_path / "events.parquet")
    titles = {"Kettle": "Kettle\nof steel", "Mug": "Mug " * 500}
    ITEMS.with_columns(title=pl.col("title").replace(titles)).write_parquet(tmp_path / "items.parquet")
    source = EventsSource.Config(
        events=(str(tmp_path / "events.parquet"),), items=str(tmp_path / "items.parquet")
    )
    build(source, BuildConfig(out=str(tmp_path / "data"), keep_exposures=True))
    shown = dict(inspect(str(tmp_path / "data")).samples)["7"]
    assert [shown[0], shown[1], shown[3]] == ["Kettle of steel", "Pan (exposure)", "Pan"]
    assert shown[2].startswith("Mug Mug") and len(shown[2]) <= 80


def test_names_with_brackets_are_shown_as_they_are(tmp_path):
    marked = {"Kettle": "Kettle [/b] [red]", "Pan": "Pan [2-pack]", "Mug": "Mug :heart:"}
    events = EVENTS.with_columns(
        action=pl.col("action").replace("cart", "[/cart]"),
        user_id=pl.format("[/{}]", "user_id"),
    )
    events.write_parquet(tmp_path / "events.parquet")
    ITEMS.with_columns(title=pl.col("title").replace(marked)).write_parquet(tmp_path / "items.parquet")
    source = EventsSource.Config(
        events=(str(tmp_path / "events.parquet"),), items=str(tmp_path / "items.parquet")
    )
    build(source, BuildConfig(out=str(tmp_path / "data")))
    console = Console(file=io.StringIO(), width=120)
    console.print(inspect(str(tmp_path / "data")).render())
    text = console.file.getvalue()
    for shown in ("Kettle [/b] [red]", "Pan [2-pack]", "Mug :heart:", "[/cart] 2", "[/7]"):
        assert shown in text


def test_a_damaged_shard_is_noticed(data_set):
    record = Manifest.load(Storage(data_set)).chunks[0]
    path = data_set / record.shard
    content = bytearray(path.read_bytes())
    content[record.start + 600] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="the checksum is not that of the manifest"):
        inspect(str(data_set))


def test_a_changed_or_missing_item_table_is_noticed(data_set):
    path = data_set / "items.parquet"
    pl.read_parquet(path).with_columns(title=pl.lit("x")).write_parquet(path)
    with pytest.raises(DataError, match=r"the checksum of .*items\.parquet is not that of the manifest"):
        inspect(str(data_set))
    path.unlink()
    with pytest.raises(DataError, match=r"items\.parquet is missing; build the data set again"):
        inspect(str(data_set))


def test_damaged_embeddings_are_noticed(tmp_path):
    EVENTS.write_parquet(tmp_path / "events.parquet")
    ITEMS.write_parquet(tmp_path / "items.parquet")
    np.save(tmp_path / "vectors.npy", np.ones((4, 2), dtype=np.float32))
    source = EventsSource.Config(
        events=(str(tmp_path / "events.parquet"),),
        items=str(tmp_path / "items.parquet"),
        embeddings=str(tmp_path / "vectors.npy"),
    )
    build(source, BuildConfig(out=str(tmp_path / "data")))
    inspect(str(tmp_path / "data"))
    np.save(tmp_path / "data" / "item_embeddings.npy", np.ones((3, 2), dtype=np.float32))
    with pytest.raises(DataError, match=r"must be a float32 matrix \(4, 2\), found float32 \(3, 2\)"):
        inspect(str(tmp_path / "data"))


def test_fewer_than_no_samples_are_refused(data_set):
    assert inspect(str(data_set), num_samples=0).samples == []
    with pytest.raises(ConfigError, match="--samples must be at least 0, given -1"):
        inspect(str(data_set), num_samples=-1)


def test_a_data_set_that_cannot_be_written_to_is_inspected(data_set, monkeypatch):
    def refuse(storage, name, data):
        raise PermissionError(13, "Permission denied", storage.path(name))

    monkeypatch.setattr(Storage, "write", refuse)
    report = inspect(str(data_set))
    assert report.plot == f"none: {data_set} cannot be written to (Permission denied)"
    assert not (data_set / "inspect.png").exists() and len(report.lengths) == 2
