"""Training users become prompts: what comes before the last page or event, and what was then taken."""

import torch

from data_streams.batch import CLICKED, EXPOSED, ORDERED, Pages, SequenceBatch
from data_streams.jagged import Jagged
from rl.prompts import POSITIVES, prompt_batch, to_batch, to_prompts

CODES = torch.stack((torch.arange(10), torch.arange(10) % 2), dim=1).int()


def jagged(*rows):
    values = torch.tensor([value for row in rows for value in row], dtype=torch.int64)
    return Jagged.from_lengths(values, torch.tensor([len(row) for row in rows]))


def users(**parts):
    return SequenceBatch(
        user_ids=torch.tensor([10, 11, 12]),
        items=jagged([1, 2, 3], [4], [5, 6]),
        targets=torch.tensor([2, 3, 7, 8, 6, 9]),
        features={"play_time_s": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])},
        target_features={"play_time_s": torch.tensor([2.0, 3.0, 0.75, 0.5, 6.0, 0.25])},
        **parts,
    )


def rows(found):
    return [values.tolist() for values in found.values.split(found.lengths.tolist())]


def test_without_pages_the_last_event_is_what_was_taken():
    prompts = prompt_batch(users())
    assert rows(prompts.items) == [[1, 2, 3], [4], [5, 6]]
    assert rows(prompts.supervision[POSITIVES]) == [[7], [8], [9]]
    given = to_prompts(prompts, torch.tensor([100, 101, 102]), CODES)
    assert given.positive_paths.tolist() == [[7, 1], [8, 0], [9, 1]]
    assert given.positive_features["play_time_s"].tolist() == [0.75, 0.5, 0.25]
    assert given.serials.tolist() == [100, 101, 102] and given.history_offsets.tolist() == [0, 3, 4, 6]
    again = to_batch(given)
    assert rows(again.items) == rows(prompts.items)
    assert again.features["play_time_s"].tolist() == [1, 2, 3, 4, 5, 6]


def test_with_pages_the_chosen_items_of_the_last_page_are_what_was_taken():
    pages = Pages(
        items=jagged([2, 30], [7, 31, 32], [40, 8]),
        strengths=torch.tensor([CLICKED, EXPOSED, ORDERED, CLICKED, EXPOSED, ORDERED, CLICKED]),
        positions=torch.full((7,), -1),
        history_lengths=jagged([1, 2], [], [1]),
        times_s=torch.full((3,), -1),
    )
    prompts = prompt_batch(users(pages=pages))
    # The second user has no page left: the last event stands for it.
    assert rows(prompts.items) == [[1, 2], [4], [5]]
    assert rows(prompts.supervision[POSITIVES]) == [[7, 31], [8], [40, 8]]
    assert prompts.features["play_time_s"].tolist() == [1, 2, 4, 5]


def test_a_batch_without_users_is_a_batch_without_prompts():
    nobody = users().select(0, 0)
    prompts = prompt_batch(nobody)
    assert prompts.num_users == 0 and prompts.supervision[POSITIVES].num_rows == 0
    assert to_prompts(prompts, torch.zeros(0, dtype=torch.int64), CODES).num_users == 0
