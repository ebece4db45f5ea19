"""A run's tokenizer stays with it, and is that of the run or the language model it starts from where there is one."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl
import pytest

from cluster.errors import ConfigError
from data_streams.build import build
from data_streams.build_config import BuildConfig
from data_streams.configuration import DataConfig
from data_streams.sources.events import EventsSource
from data_streams.text_tokenizer import TOKENIZER, TextTokenizer
from models.texts import TextConfig
from tests.tiny_run import NUM_ITEMS, build_tiny_data
from trainer.configuration import PretrainConfig
from trainer.texts import load_texts


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A model's configuration, as far as its texts go."""

    text: TextConfig = field(default_factory=TextConfig)
    pretrained: str = ""
    reads_item_texts: bool = True
    needs_texts = True


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return build_tiny_data(tmp_path_factory.mktemp("data"))


def test_a_run_keeps_its_tokenizer_and_hands_it_to_runs_that_start_from_it(data, tmp_path):
    config = PretrainConfig(run_dir=str(tmp_path / "run"), data=DataConfig(path=data), model=Reading())
    texts = load_texts(config)
    assert texts.items.num_rows == NUM_ITEMS and texts.users is None
    assert texts.vocabulary_size <= 2048
    other = replace(config, model=Reading(text=TextConfig(vocabulary_size=256)))
    assert load_texts(other).fingerprint == texts.fingerprint
    following = replace(other, run_dir=str(tmp_path / "next"), init_from=config.run_dir)
    assert load_texts(following).fingerprint == texts.fingerprint
    assert Path(following.run_dir, TOKENIZER).read_text() == Path(config.run_dir, TOKENIZER).read_text()
    assert load_texts(replace(other, run_dir=str(tmp_path / "own"))).fingerprint != texts.fingerprint
    assert load_texts(replace(config, model=None)) is None


def test_a_language_model_brings_its_tokenizer(data, tmp_path):
    config = PretrainConfig(
        run_dir=str(tmp_path / "run"), data=DataConfig(path=data), model=Reading(pretrained=str(tmp_path))
    )
    with pytest.raises(ConfigError, match=r"must hold tokenizer\.json"):
        load_texts(config)
    own = TextTokenizer.train(["a language model's own words"], 300)
    own.save(str(tmp_path))
    assert load_texts(config).fingerprint == own.fingerprint


def test_items_without_titles_are_no_matter_to_a_model_that_reads_only_users(tmp_path):
    source = EventsSource.Config(events=(write_events(tmp_path),))
    build(source, BuildConfig(out=str(tmp_path / "shards"), ray="never"))
    model = Reading(pretrained=str(tmp_path), reads_item_texts=False)
    config = PretrainConfig(data=DataConfig(path=str(tmp_path / "shards")), model=model)
    TextTokenizer.train(["a language model's own words"], 300).save(str(tmp_path))
    texts = load_texts(config)
    assert texts.items is None and texts.encode(["words"]).num_rows == 1
    for other in (Reading(pretrained=str(tmp_path)), Reading(reads_item_texts=False)):
        with pytest.raises(ConfigError, match="and there is none"):
            load_texts(replace(config, model=other))


def write_events(folder: Path) -> str:
    rows = {"user_id": [1, 1, 1], "item_id": [7, 8, 9], "timestamp_s": [1, 2, 3]}
    pl.DataFrame(rows).write_parquet(folder / "events.parquet")
    return str(folder / "events.parquet")
