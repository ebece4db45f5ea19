"""What `grail recommend --condition` makes of its words."""

from dataclasses import replace

import polars as pl
import pytest

from cluster.errors import ConfigError
from cluster.storage import Storage
from data_streams.build import BuildConfig, build
from data_streams.configuration import DataConfig
from data_streams.sources.events import EventsSource
from data_streams.sources.world import WorldSource
from launch.cli import run as grail
from launch.commands.recommend import under_conditions
from launch.config_document import to_document, to_yaml
from launch.recipes import climber_pilot, climber_pilot_cgsa
from launch.run_directory import CONFIG


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    path = tmp_path_factory.mktemp("world") / "shards"
    source = WorldSource.Config(num_users=20, num_items=60, num_clusters=4, mean_clicks=5)
    build(source, BuildConfig(out=str(path), ray="never"))
    return DataConfig(path=str(path))


def kinds(data) -> list[str]:
    from data_streams.item_conditions import ItemConditions

    return ItemConditions.load(data.path, "categories").names


def test_a_model_trained_for_a_column_is_asked_and_others_are_filtered(data):
    first, second, *_ = kinds(data)
    for recipe, way in ((climber_pilot, "filter"), (climber_pilot_cgsa, "attention")):
        config = replace(recipe.recipe(), data=data)
        asked = under_conditions(config, (f"category={first}", f"categories={second}")).evaluation
        assert (asked.condition, asked.condition_column, asked.conditions) == (
            way,
            "categories",
            (first, second),
        )
        assert under_conditions(config, ()).evaluation.condition == "none"


def test_a_column_called_category_is_taken_at_its_word(tmp_path):
    events = pl.DataFrame({"user_id": [1, 1, 1], "item_id": [1, 2, 3], "timestamp": [1, 2, 3]})
    events.write_parquet(tmp_path / "events.parquet")
    items = pl.DataFrame({"item_id": [1, 2, 3], "title": list("xyz"), "category": ["A", "B", "B"]})
    items.write_parquet(tmp_path / "items.parquet")
    source = EventsSource.Config(
        events=(str(tmp_path / "events.parquet"),), items=str(tmp_path / "items.parquet")
    )
    build(source, BuildConfig(out=str(tmp_path / "shards"), ray="never"))
    config = replace(climber_pilot.recipe(), data=DataConfig(path=str(tmp_path / "shards")))
    asked = under_conditions(config, ("category=B",)).evaluation
    assert (asked.condition_column, asked.conditions) == ("category", ("B",))


def test_conditions_that_cannot_be_met_are_refused(data):
    config = replace(climber_pilot.recipe(), data=data)
    near = kinds(data)[0][:-1]
    with pytest.raises(ConfigError, match=rf"no item has the categories '{near}'; did you mean"):
        under_conditions(config, (f"category={near}",))
    with pytest.raises(ConfigError, match=r"the items of .* have no column 'colour' \(there are: categories"):
        under_conditions(config, ("colour=red",))
    for words in (("Sofa",), ("category=",), ("category=Sofa", "title=x")):
        with pytest.raises(ConfigError, match=r"--condition must be COLUMN=VALUE"):
            under_conditions(config, words)


def test_a_column_of_conditions_that_nothing_asks_for_is_refused(data, tmp_path, capsys):
    config = replace(climber_pilot.recipe(), data=data, run_dir=str(tmp_path))
    Storage(str(tmp_path)).write(CONFIG, to_yaml(to_document(config)).encode())
    line = ["evaluate", str(tmp_path), "--evaluation.condition-column", "categories"]
    assert grail(line) == 2
    assert "condition-column categories says what --evaluation.condition filter" in capsys.readouterr().err
    assert grail([*line, "--evaluation.condition", "filter"]) == 1
    assert "holds no complete checkpoint" in capsys.readouterr().err
