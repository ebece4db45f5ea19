"""Pages on their way from a log to a batch: by hand, against a loop, and at every bad input."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError, DataError
from data_streams.batch import CLICKED, EXPOSED, ORDERED
from data_streams.build import BuildConfig, build
from data_streams.configuration import DataConfig
from data_streams.evaluation_stream import EvaluationStream
from data_streams.manifest import Manifest
from data_streams.sources.ebnerd import EbnerdSource
from data_streams.sources.world import WorldSource
from data_streams.stream import TrainStream, merge_positions
from tests.data_streams.test_build import build_events, page_events
from tests.data_streams.tiny_data import make_chunk, write_data_set

USERS = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> str:
    """A small world with its exposures, and purchases beside the clicks."""
    path = tmp_path_factory.mktemp("world") / "shards"
    source = WorldSource.Config(num_users=USERS, num_items=200, num_clusters=8, mean_clicks=12)
    build(
        source,
        BuildConfig(out=str(path), ray="never", keep_exposures=True, page_actions=("cart", "purchase")),
    )
    return str(path)


def config(path, **options) -> DataConfig:
    return DataConfig(path=str(path), **{"pages": "auto", "num_streams": 2, "max_length": 100} | options)


def training(path, **options) -> list:
    stream = TrainStream(config(path, **options), seed=0, rank=0, world_size=1)
    batches = list(stream.batches(0))
    stream.check_epoch(stream.epoch_totals)
    return batches


def evaluation(path, split, **options) -> list:
    stream = EvaluationStream(config(path, **options), split=split, rank=0, world_size=1, users_per_batch=16)
    return list(stream.batches())


def by_user(batches) -> dict[int, list[tuple]]:
    """User -> pages: (history, items, strengths, positions) as lists."""
    found = defaultdict(list)
    for batch in batches:
        pages, ends = batch.pages, batch.pages.history_ends(batch.items).tolist()
        for page, user in enumerate(pages.history_lengths.row_index().tolist()):
            inside = slice(pages.items.offsets[page], pages.items.offsets[page + 1])
            history = batch.items.values[batch.items.offsets[user] : ends[page]].tolist()
            columns = (pages.items.values, pages.strengths, pages.positions)
            found[int(batch.user_ids[user])].append(
                (history, *(column[inside].tolist() for column in columns))
            )
    return dict(found)


def raw_users(path):
    """User -> rows (item, action, page, position), with the borders of the split, read without the code under test."""
    from cluster.storage import Storage
    from data_streams.shards import read_chunk

    storage = Storage(path)
    manifest = Manifest.load(storage)
    for record in manifest.chunks:
        chunk = read_chunk(
            storage, record, manifest=manifest, columns=("action", "page_id", "position", "timestamp_s")
        )
        for user in range(chunk.num_users):
            events = slice(chunk.offsets[user], chunk.offsets[user + 1])
            actions = [manifest.actions[code] for code in chunk.columns["action"][events]]
            rows = zip(
                chunk.items[events].tolist(),
                actions,
                chunk.columns["page_id"][events].tolist(),
                chunk.columns["position"][events].tolist(),
                strict=True,
            )
            borders = (chunk.train_end[user], chunk.valid_at[user], chunk.test_at[user])
            yield int(chunk.users[user]), list(rows), tuple(map(int, borders))


STRENGTH = {"exposure": EXPOSED, "click": CLICKED, "cart": CLICKED, "purchase": ORDERED}


def naive_page(rows, number, stop):
    """One page, event by event -> (history, items, strengths, positions) or None where it is no target."""
    begin = next(place for place, row in enumerate(rows) if row[2] == number)
    history = [item for item, action, _, _ in rows[:begin] if action == "click"]
    goes_on = any(row[2] == number for row in rows[stop:])
    items = {}
    for place, (item, action, page, position) in enumerate(rows[:stop]):
        if page != number or (goes_on and action == "exposure"):
            continue
        strength, where, first = items.get(item, (-1, 10**9, place))
        items[item] = (max(strength, STRENGTH[action]), min(where, position), first)
    order = sorted(items, key=lambda item: (-items[item][0], items[item][1], items[item][2]))
    strengths = [items[item][0] for item in order]
    if not history or not any(strengths):
        return None
    return history, order[:10], strengths[:10], [items[item][1] for item in order][:10]


def test_training_pages_of_the_world_equal_a_loop_over_its_events(world):
    found, expected = by_user(training(world)), {}
    for user, rows, (train_end, _, _) in raw_users(world):
        numbers = dict.fromkeys(row[2] for row in rows[:train_end])
        pages = [naive_page(rows, number, train_end) for number in numbers]
        expected[user] = [page for page in pages if page is not None]
    assert found == {user: pages for user, pages in expected.items() if pages}
    strengths = {strength for pages in found.values() for page in pages for strength in page[2]}
    assert strengths == {EXPOSED, CLICKED, ORDERED}


def test_training_on_pages_goes_on_from_a_position_that_was_written_down(world):
    whole = training(world, tokens_per_step=100)
    assert len(whole) > 3
    position = json.loads(json.dumps(merge_positions([whole[1].position])))
    stream = TrainStream(config(world, tokens_per_step=100), seed=0, rank=0, world_size=1)
    rest = list(stream.batches(0, position))
    assert [batch.user_ids.tolist() for batch in rest] == [batch.user_ids.tolist() for batch in whole[2:]]
    assert by_user(rest) == by_user(whole[2:])


@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluation_gives_the_page_of_the_held_out_item(world, split):
    found = by_user(evaluation(world, split))
    for user, rows, (_, valid_at, test_at) in raw_users(world):
        at, stop = (valid_at, test_at) if split == "valid" else (test_at, len(rows))
        if at < 0:
            continue
        assert found.get(user, [None]) == [naive_page(rows, rows[at][2], stop)]
        assert user not in found or rows[at][0] in found[user][0][1]


def test_exposures_and_page_actions_are_no_history_unless_asked_for(world):
    raw = {user: rows for user, rows, _ in raw_users(world)}
    for batch in evaluation(world, "serve"):
        assert batch.pages is None
        for index, user in enumerate(batch.user_ids.tolist()):
            history = batch.items.values[batch.items.offsets[index] : batch.items.offsets[index + 1]].tolist()
            assert history == [item for item, action, _, _ in raw[user] if action == "click"]
    (longest,) = {len(rows) for rows in raw.values() if len(rows) == max(map(len, raw.values()))}
    everything = evaluation(world, "serve", history_exposures=True, max_length=10_000)
    assert max(batch.items.max_length for batch in everything) == longest


def test_pages_see_the_history_that_is_left_after_the_cut_to_the_maximum_length(world):
    whole, cut = by_user(training(world)), by_user(training(world, max_length=4))
    assert 0 < sum(map(len, cut.values())) < sum(map(len, whole.values()))
    for user, pages in cut.items():
        for history, *page in pages:
            (same,) = [before for before, *other in whole[user] if other == page]
            assert 1 <= len(history) <= 4 and same[-len(history) :] == history


def test_a_page_by_hand_with_the_cap_on_its_size(tmp_path):
    build_events(tmp_path, page_events(), keep_exposures=True)
    # Items 2 and 5 are rows of the sorted vocabulary 1..6; page y goes on beyond the training span: 4 is not kept.
    (batch,) = evaluation(tmp_path / "out", "test", page_items=1)
    assert (batch.pages.items.values.tolist(), batch.pages.strengths.tolist()) == ([5], [CLICKED])
    assert batch.pages.history_lengths.values.tolist() == [2] and batch.pages.times_s.tolist() == [30]
    (batch,) = evaluation(tmp_path / "out", "valid")
    assert batch.pages.items.values.tolist() == [4, 3]
    assert batch.pages.strengths.tolist() == [CLICKED, EXPOSED] and batch.pages.positions.tolist() == [1, 0]


def plain_data(folder, lengths=(1, 4, 9, 12)):
    chunk = make_chunk(lengths)
    write_data_set(folder, chunk, actions=["click", "like", "share", "view"])
    return chunk


def test_pages_by_count_are_counted_back_from_the_end_of_the_training_span(tmp_path):
    chunk = plain_data(tmp_path)
    items = {user: chunk.items[chunk.offsets[user] : chunk.offsets[user + 1]].tolist() for user in (1, 2, 3)}
    found = by_user(training(tmp_path, pages="count", page_events=3))
    # 9 events: 7 train, of which the first is history only; pages of 3 end with the last training event.
    assert [(page[0], page[1]) for page in found[2]] == [
        (items[2][:1], items[2][1:4]),
        (items[2][:4], items[2][4:7]),
    ]
    assert [page[0] for page in found[3]] == [items[3][:1], items[3][:4], items[3][:7]]
    assert [(page[0], page[1]) for page in found[1]] == [(items[1][:1], items[1][1:2])]


def drawn_pages(path, epoch, world_size=1, **options) -> dict[int, list[tuple]]:
    options = config(path, **{"pages": "count", "page_events": 2, "page_borders": "drawn"} | options)
    streams = [TrainStream(options, seed=0, rank=rank, world_size=world_size) for rank in range(world_size)]
    return by_user([batch for stream in streams for batch in stream.batches(epoch)])


def test_drawn_pages_cut_the_training_span_anew_in_each_epoch_and_alike_on_any_number_of_ranks(tmp_path):
    chunk = plain_data(tmp_path, lengths=(1, 4, 9, 12, 40, 60))
    sizes, cuts = [], set()
    for epoch in range(8):
        found = drawn_pages(tmp_path, epoch)
        assert drawn_pages(tmp_path, epoch, world_size=2) == found
        for user, pages in found.items():
            events = chunk.items[chunk.offsets[user] :][: chunk.train_end[user]].tolist()
            history = events[:1]
            for before, items, _, _ in pages:
                assert before == history and sorted(items) == sorted(set(items))
                size = next(n for n in range(1, len(events)) if set(events[len(history) :][:n]) == set(items))
                history = events[: len(history) + size]
                sizes.append(size)
            assert history == events, "every event but the first lies on one page"
        cuts.add(str(found))
    assert len(cuts) == 8 and 1.6 < np.mean(sizes) < 2.3
    assert (
        drawn_pages(tmp_path, 0, page_events=1)[2]
        == by_user(training(tmp_path, pages="count", page_events=1))[2]
    )


def test_pages_by_gap_begin_after_a_pause(tmp_path):
    chunk = plain_data(tmp_path)
    found, gap_s = by_user(training(tmp_path, page_gap_s=1e8)), 1e8
    for user in (2, 3):
        events = slice(chunk.offsets[user], chunk.offsets[user] + chunk.train_end[user])
        times, items = chunk.columns["timestamp_s"][events], chunk.items[events].tolist()
        pages: list[list[int]] = [[]]
        for place in range(1, len(items)):
            if times[place] - times[place - 1] > gap_s and pages[-1]:
                pages.append([])
            pages[-1].append(items[place])
        assert [sorted(page[1]) for page in found[user]] == [sorted(set(page)) for page in pages]


def test_the_log_says_where_pages_come_from(tmp_path, caplog):
    plain_data(tmp_path)
    with caplog.at_level("INFO"):
        training(tmp_path, pages="auto")
        training(tmp_path, pages="count")
    assert "synthesised: a pause of more than 900 s begins a new one" in caplog.text
    assert "synthesised: 5 events that follow each other; at most 10 items each" in caplog.text


def test_batches_without_pages_asked_for_have_none_and_empty_ones_look_alike(tmp_path):
    plain_data(tmp_path)
    assert all(batch.pages is None for batch in training(tmp_path, pages="none"))
    stream = TrainStream(config(tmp_path), seed=0, rank=0, world_size=1)
    empty, full = stream.empty_batch().pages, next(stream.batches(0)).pages
    assert (empty.num_pages, empty.history_lengths.num_rows) == (0, 0)
    for name in ("strengths", "positions", "times_s"):
        assert getattr(empty, name).dtype == getattr(full, name).dtype == torch.int64


def test_a_part_of_a_batch_keeps_the_pages_of_its_users(world):
    batch = training(world, tokens_per_step=512)[0]
    parts = [batch.select(user, user + 1) for user in range(batch.num_users)]
    assert by_user(parts) == by_user([batch])
    assert torch.cat([part.pages.times_s for part in parts]).equal(batch.pages.times_s)


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_hold_about_the_history_events_the_budget_says(world, world_size):
    streams = [
        TrainStream(config(world, tokens_per_step=64), seed=0, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    steps = max(len(list(stream.batches(0))) for stream in streams)
    assert steps == pytest.approx(streams[0].steps_per_epoch(), rel=0.2)


def test_steps_are_planned_for_all_actions_of_histories_not_only_for_those_that_are_held_out(tmp_path):
    options = {"sequence_actions": ("click", "cart", "purchase"), "split_actions": ("click",)}
    source = WorldSource.Config(num_users=100, num_items=200, num_clusters=8, mean_clicks=20)
    manifest = build(
        source, BuildConfig(out=str(tmp_path), overwrite=True, ray="never", keep_exposures=True, **options)
    )

    def planned_and_taken() -> tuple[int, int]:
        # As one stream, whose steps are full but for the last.
        chosen = config(tmp_path, pages="none", tokens_per_step=64, num_streams=1)
        stream = TrainStream(chosen, seed=0, rank=0, world_size=1)
        return stream.steps_per_epoch(), len(list(stream.batches(0)))

    planned, taken = planned_and_taken()
    assert planned == pytest.approx(taken, rel=0.1)
    # A data set built before they were counted can be read; its plan falls short.
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert content.pop("num_train_history_events") == manifest.num_train_history_events
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert planned_and_taken()[0] < 0.9 * taken


def test_two_ranks_see_the_pages_that_one_sees(world):
    streams = [TrainStream(config(world), seed=0, rank=rank, world_size=2) for rank in range(2)]
    both = by_user(batch for stream in streams for batch in stream.batches(0))
    assert both == by_user(training(world))


def test_pages_without_any_target_are_bad_input(tmp_path):
    chunk = make_chunk([9] * 8)
    chunk.columns["page_id"] = np.full(72, -1, dtype=np.int32)
    write_data_set(tmp_path, chunk, actions=["click"] * 4)
    with pytest.raises(DataError, match=r"of the 0 pages of .* none is left .* say --data.pages count"):
        training(tmp_path, pages="recorded")
    chunk.columns["page_id"] = np.zeros(72, dtype=np.int32)
    write_data_set(tmp_path, chunk, actions=["click"] * 4)
    with pytest.raises(DataError, match=r"of the 8 pages .* 8 no history\); build the data with clicks"):
        training(tmp_path, pages="recorded")


def test_pages_that_the_data_cannot_give_are_refused(tmp_path):
    plain_data(tmp_path)
    with pytest.raises(ConfigError, match=r"recorded needs events with page_id, .* --data.pages count"):
        training(tmp_path, pages="recorded")
    with pytest.raises(ConfigError, match=r"data.page-events must be at least 1, is 0"):
        training(tmp_path, page_events=0)


def test_page_actions_may_not_be_part_of_the_sequence():
    from data_streams.build_config import check_options

    with pytest.raises(ConfigError, match=r"yet purchase are also among --sequence-actions"):
        check_options(
            BuildConfig(out="x", sequence_actions=("click", "purchase"), page_actions=("purchase",))
        )


def test_the_pages_of_a_real_log_come_through(tmp_path, shared_data):
    source = EbnerdSource.Config(path=str(shared_data / "ebnerd_fixture"))
    build(source, BuildConfig(out=str(tmp_path / "out"), ray="never", keep_exposures=True))
    found = by_user(training(tmp_path / "out", page_items=1000))
    sizes = np.array([len(page[1]) for pages in found.values() for page in pages])
    assert len(sizes) > 100 and 5 < sizes.mean() < 30
    strengths = [page[2] for pages in found.values() for page in pages]
    assert all(CLICKED in part and part == sorted(part, reverse=True) for part in strengths)
