"""Exposures around held-out events, by hand."""

import polars as pl
import pytest

from cluster.errors import ConfigError, DataError
from cluster.storage import Storage
from data_streams.build import build
from data_streams.build_config import BuildConfig
from data_streams.configuration import DataConfig
from data_streams.evaluation_stream import EvaluationStream
from data_streams.exposures import ExposureStream
from data_streams.manifest import Manifest
from data_streams.sources.events import EventsSource
from data_streams.stream import TrainStream

PAGES = (
    (0, "ab", "a", ""),
    (1, "cd", "", ""),
    (2, "ef", "e", "e"),
    (3, "gh", "", ""),
    (4, "ij", "ij", "j"),
    (5, "k", "", ""),
)
"""page, what was shown, clicked, and bought; the last but one click is i, the last is j, on the same page."""
MORE = (*PAGES, (6, "lm", "", ""), (7, "no", "o", ""))
"""The last click is o, the last but one j."""


def build_pages(folder, pages=PAGES, **options):
    rows, time = [], 0
    for page, shown, clicked, bought in pages:
        for action, items in (("exposure", shown), ("click", clicked), ("purchase", bought)):
            for item in items:
                time += 1
                rows.append(("u", item, time, action, page))
    return build_rows(folder, rows, **options)


def build_rows(folder, rows, **options):
    """Of user, item, second, action and page."""
    names = ["user_id", "item_id", "timestamp_s", "action", "page_id"]
    folder.mkdir(exist_ok=True)
    pl.DataFrame(rows, schema=names, orient="row").write_parquet(folder / "events.parquet")
    source = EventsSource.Config(events=(str(folder / "events.parquet"),))
    chosen = {"keep_exposures": True, "split_actions": ("click",), **options}
    build(source, BuildConfig(out=str(folder / "shards"), ray="never", **chosen))
    return str(folder / "shards")


def letters(items):
    return "".join(sorted(chr(ord("a") + item) for item in items))


def known_actions(path):
    return tuple(name for name in Manifest.load(Storage(path)).actions if name != "exposure")


def read(path, split, max_length=10):
    return list(stream_of(path, split=split, max_length=max_length).batches())


def stream_of(path, *, split="test", max_length=10, **options):
    parts = {"rank": 0, "world_size": 1, "users_per_batch": 100, "actions": known_actions(path), **options}
    return ExposureStream(DataConfig(path=path, max_length=max_length), split=split, **parts)


def seen(batch):
    """The history, what was shown, what of it was clicked and what bought."""
    shown = batch.candidates[0].tolist()
    answered = [
        letters(item for item, yes in zip(shown, batch.answers[0, :, answer], strict=True) if yes)
        for answer in range(batch.answers.shape[2])
    ]
    return letters(batch.histories.items.values.tolist()), letters(shown), *answered


def test_the_pages_since_the_last_answer_are_candidates_with_their_answers(tmp_path):
    path = build_pages(tmp_path / "data", MORE)
    # Items are numbered in the order of their names.
    (valid,), (test,) = read(path, "valid"), read(path, "test")
    assert seen(valid) == ("ae", "ghij", "ij", "j")
    assert seen(test) == ("aeij", "klmno", "o", "")
    (short,) = read(path, "valid", max_length=1)
    assert letters(short.histories.items.values.tolist()) == "e"


def test_a_page_with_both_held_out_clicks_is_of_the_test_alone(tmp_path):
    path = build_pages(tmp_path / "data")
    (test,) = read(path, "test")
    assert seen(test) == ("ae", "ghij", "ij", "j")
    assert read(path, "valid") == []


def test_a_single_held_out_click_is_of_both_splits(tmp_path):
    path = build_pages(tmp_path / "data", split="leave-one-out")
    for split in ("valid", "test"):
        assert [seen(batch) for batch in read(path, split)] == [("ae", "ghij", "ij", "j")]
    assert trained_exposures(path) == "abcdef"


def test_users_are_read_some_at_a_time(tmp_path):
    rows = []
    for user in "uvw":
        for page, item in enumerate("abcd"):
            rows += [(user, item, 2 * page, "exposure", page), (user, item, 2 * page + 1, "click", page)]
    path = build_rows(tmp_path / "data", rows)
    (whole,) = stream_of(path).batches()
    parts = list(stream_of(path, users_per_batch=2).batches())
    assert [part.histories.num_users for part in parts] == [2, 1]
    for name in ("candidates", "answers"):
        assert getattr(whole, name).tolist() == [
            row for part in parts for row in getattr(part, name).tolist()
        ]
    items = [item for part in parts for item in part.histories.items.values.tolist()]
    assert whole.histories.items.values.tolist() == items


def test_a_share_of_the_users_is_that_of_retrieval(tmp_path):
    rows = [
        (user, item, 2 * page + clicked, ("exposure", "click")[clicked], page)
        for user in "uvwxyz"
        for page, item in enumerate("abcd")
        for clicked in range(2)
    ]
    path = build_rows(tmp_path / "data", rows)
    parts = {"split": "test", "rank": 0, "world_size": 1, "users_per_batch": 10, "user_share": 0.4}
    (retrieved,) = EvaluationStream(DataConfig(path=path), **parts).batches()
    (batch,) = stream_of(path, user_share=0.4).batches()
    assert 0 < batch.histories.num_users < 6
    assert batch.histories.user_ids.tolist() == retrieved.user_ids.tolist()


@pytest.mark.parametrize("pages", [PAGES, MORE])
def test_no_exposure_is_trained_on_that_evaluates_a_model(tmp_path, pages):
    path = build_pages(tmp_path / "data", pages)
    assert trained_exposures(path) == "abcdef"


def trained_exposures(path):
    config = DataConfig(path=path, history_exposures=True, columns=("action", "page_id"), tokens_per_step=512)
    names = Manifest.load(Storage(path)).actions
    shown = []
    for batch in TrainStream(config, seed=0, rank=0, world_size=1).batches(0):
        is_shown = batch.features["action"] == names.index("exposure")
        shown += batch.items.values[is_shown].tolist()
    return letters(shown)


def test_pages_that_overlap_are_evaluated_from_the_beginning_of_the_held_out_one(tmp_path):
    """Page 1 with d is begun before page 2, on which c is clicked before d is."""
    rows = [("a", "exposure", 0), ("a", "click", 0), ("d", "exposure", 1), ("b", "exposure", 1)]
    rows += [
        ("c", "exposure", 2),
        ("c", "click", 2),
        ("d", "click", 1),
        ("e", "exposure", 3),
        ("e", "click", 3),
    ]
    path = build_rows(
        tmp_path / "data", [("u", item, at, action, page) for at, (item, action, page) in enumerate(rows)]
    )
    assert seen_clicks(read(path, "valid")) == [("a", "bcd", "cd")]
    assert seen_clicks(read(path, "test")) == [("acd", "e", "e")]
    assert trained_exposures(path) == "a"


def test_data_without_pages_keeps_its_exposures(tmp_path):
    """Only models of answers need pages."""
    rows = [("u", item, at, "exposure" if at % 2 else "click") for at, item in enumerate("abcdefgh")]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp_s", "action"], orient="row")
    frame.write_parquet(tmp_path / "events.parquet")
    source = EventsSource.Config(events=(str(tmp_path / "events.parquet"),))
    build(source, BuildConfig(out=str(tmp_path / "shards"), ray="never", keep_exposures=True))
    config = DataConfig(path=str(tmp_path / "shards"), history_exposures=True, tokens_per_step=512)
    (batch,) = TrainStream(config, seed=0, rank=0, world_size=1).batches(0)
    assert letters(batch.items.values.tolist()) == "abc"


def seen_clicks(batches):
    return [seen(batch)[:3] for batch in batches]


def test_what_lies_on_no_page_answers_nothing_and_evaluates_nothing(tmp_path):
    """Both users do the same on pages; the second one also clicks d and e outside of any, and ends so."""
    rows = [
        ("a", "exposure", 0),
        ("a", "click", 0),
        ("d", "exposure", 1),
        ("b", "exposure", 1),
        ("b", "click", 1),
    ]
    rows += [("c", "exposure", 2), ("c", "click", 2)]
    log = [("u", item, at, action, page) for at, (item, action, page) in enumerate(rows)]
    log += [("v", *event) for _, *event in log[:2]] + [
        ("v", "d", 30, "click", None),
        ("v", "e", 31, "click", None),
    ]
    path = build_rows(tmp_path / "data", log)
    assert seen_clicks(read(path, "valid")) == [("a", "bd", "b")]
    assert seen_clicks(read(path, "test")) == [("ab", "c", "c")]


def test_a_rank_without_users_has_empty_batches(tmp_path):
    path = build_pages(tmp_path / "data")
    alone, stream = (stream_of(path, actions=("click",), rank=rank, world_size=2) for rank in range(2))
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
        stream_of(path, actions=("click",))


def test_users_of_a_chunk_may_all_be_without_a_history(tmp_path):
    """What they chose was cut off behind what they were shown later."""
    rows = [("u", "a", 0, "click", 0), *(("u", "b", time, "exposure", time) for time in range(1, 5))]
    path = build_rows(tmp_path, rows, max_events_per_user=3)
    for options in ({"held_out_action": "click"}, {"lag_s": 1.0}):
        config = DataConfig(path=path, feedback_lag_s=options.pop("lag_s", 0.0))
        for split in ("valid", "test", "serve"):
            stream = EvaluationStream(config, split=split, rank=0, world_size=1, users_per_batch=4, **options)
            assert list(stream.batches()) == []
