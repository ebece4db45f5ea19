"""What a text model reads, written out by hand from a few users, items and candidates."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged, gather_ranges
from models.tables import LookedUp
from models.text_reader import ITEM_END, REGION_BEGIN, REGION_END, TEXT_BEGIN, TEXT_END, TextReader
from models.text_reading import Reading, framed, sums_within
from models.texts import Texts

SIZE = 10
SEP, OPEN, CLOSE, BEGIN, END = (
    SIZE + mark for mark in (ITEM_END, REGION_BEGIN, REGION_END, TEXT_BEGIN, TEXT_END)
)
ITEMS = [[1, 2], [3], [4, 5, 6], []]
USERS = [[7], [8, 9]]


def jagged(rows, dtype=torch.int32) -> Jagged:
    values = torch.tensor([token for row in rows for token in row], dtype=dtype)
    return Jagged.from_lengths(values, torch.tensor([len(row) for row in rows]))


def make_reader(profiles=True, **options) -> TextReader:
    texts = Texts(
        items=jagged(ITEMS),
        users=jagged(USERS) if profiles else None,
        vocabulary_size=SIZE,
        fingerprint="",
    )
    return TextReader(texts=texts, **options)


def make_users(histories) -> SequenceBatch:
    return SequenceBatch(user_ids=torch.arange(len(histories)), items=jagged(histories, torch.int64))


def written(reading: Reading, rows: Jagged) -> list[list[int]]:
    tokens = reading.segments.values[rows.values].tolist()
    bounds = rows.offsets.tolist()
    return [tokens[start:stop] for start, stop in pairwise(bounds)]


def test_a_user_is_a_region_of_attributes_and_items_and_a_query_stands_behind_it():
    batch = make_users([[0, 1, 0], [2]])
    visible = jagged([[3, 1], [1]], torch.int64)
    reading = make_reader().retrieval(batch, visible, np.array([1, 3]))
    # Both ways, so prompts that know other events have a copy of their own, in the order of what they know.
    assert written(reading, reading.alone) == [[3, SEP], [SEP]]
    assert written(reading, reading.regions) == [
        [OPEN, 7, 1, 2, SEP],
        [OPEN, 7, 1, 2, SEP, 3, SEP, 1, 2, SEP],
        [OPEN, 8, 9, 4, 5, 6, SEP],
        [CLOSE],
    ]
    assert reading.slots.tolist() == [1, 0, 2]
    assert written(reading, reading.prompts) == [[CLOSE]] * 3
    assert reading.visible.lengths.tolist() == [1, 1, 1, 0]
    assert reading.visible.values.tolist() == [5, 10, 7]
    lengths = reading.regions.lengths
    assert torch.equal(reading.region_limits, lengths[reading.regions.row_index()])
    # Every text is there once.
    assert len(reading.segments.lengths) == 4 + 2 + 1


def test_behaviours_that_see_no_later_one_serve_all_prompts_of_a_user():
    reading = make_reader(is_bidirectional=False, num_soft_prompts=2).retrieval(
        make_users([[0, 1, 0]]), jagged([[3, 1]], torch.int64), np.zeros(0, dtype=np.int64)
    )
    soft = [SIZE + 5, SIZE + 6]
    assert written(reading, reading.regions) == [[*soft, OPEN, 7, 1, 2, SEP, 3, SEP, 1, 2, SEP], [CLOSE]]
    assert reading.region_limits.tolist() == [4] * 4 + [7] * 3 + [9] * 2 + [12] * 3 + [1]
    assert reading.visible.values.tolist() == [12, 7]


@pytest.mark.parametrize("profiles", [True, False])
def test_candidates_stand_behind_the_part_they_know_and_see_themselves_forward(profiles):
    batch = make_users([[0, 1], []])
    visible = jagged([[2, 2], [0]], torch.int64)
    reading = make_reader(profiles).scoring(batch, visible, np.array([2, 0, 2]))
    first, second = ([7], [8, 9]) if profiles else ([], [])
    assert written(reading, reading.regions) == [
        [OPEN, *first, 1, 2, SEP, 3, SEP],
        [OPEN, *second],
        [CLOSE],
    ]
    shown = [[CLOSE, BEGIN, 4, 5, 6, END], [CLOSE, BEGIN, 1, 2, END]]
    assert written(reading, reading.prompts) == [shown[0], shown[1], shown[0]]
    tokens, limits = reading.segments.values.tolist(), reading.segment_limits.tolist()
    at = tokens.index(BEGIN)
    assert tokens[at : at + 4] == [BEGIN, 1, 2, END] and limits[at : at + 4] == [1, 2, 3, 4]
    assert limits[:3] == [3, 3, 3]
    assert reading.words(SIZE).tolist() == [1, 2, 3, 7, 8, 11 + 1, 11 + 2, 11 + 3]
    assert reading.words(SIZE, torch.tensor([False, True, False])).tolist() == [7, 8]


def test_of_a_text_the_last_token_alone_may_reach_the_upper_layers():
    reading = make_reader(only_last=True).scoring(
        make_users([[0, 1]]), jagged([[2]], torch.int64), np.array([2])
    )
    assert written(reading, reading.regions) == [[OPEN, 7, SEP, SEP], [CLOSE]]
    assert written(reading, reading.prompts) == [[CLOSE, END]]


def test_a_reading_travels_as_ids_and_comes_back():
    shown = np.array([2])
    reading = make_reader().scoring(make_users([[0, 1]]), jagged([[2]], torch.int64), shown, with_items=True)
    rows = {name: LookedUp(ids=ids, rows=torch.zeros(0, 0)) for name, ids in reading.as_ids().items()}
    back = Reading.of(rows)
    for name in ("segments", "alone", "regions", "prompts", "visible"):
        one, other = getattr(back, name), getattr(reading, name)
        assert torch.equal(one.values, other.values) and torch.equal(one.offsets, other.offsets)
        assert one.max_length == other.max_length
    assert torch.equal(back.region_limits, reading.region_limits)


def test_ranges_sums_and_frames_are_those_of_their_examples():
    assert gather_ranges(np.array([4, 9]), np.array([2, 3])).tolist() == [4, 5, 9, 10, 11]
    within, sums = sums_within(np.array([2, 3, 4]), np.array([2, 0, 1]))
    assert within.tolist() == [2, 5, 4] and sums.tolist() == [5, 0, 4]
    tokens, lengths = framed(jagged([[3, 5], []]), np.array([0, 1]), [8], [9, 9])
    assert tokens.tolist() == [8, 3, 5, 9, 9, 8, 9, 9] and lengths.tolist() == [5, 3]
