"""Equal supervised tokens, and the pairs that are compared."""

import polars as pl
import pytest
import torch

from benchmarks.experiments.genrec import (
    Options,
    Supervision,
    Variant,
    compared,
    equal_steps,
    supervised_tokens,
)
from cluster.errors import ConfigError
from data_streams.batch import CLICKED, EXPOSED, ORDERED, Pages, SequenceBatch
from data_streams.jagged import Jagged


def test_supervised_tokens_are_counted_by_hand():
    strengths = torch.tensor([ORDERED, CLICKED, EXPOSED, EXPOSED, CLICKED])
    pages = Pages(
        items=Jagged.from_lengths(torch.arange(5), torch.tensor([4, 1])),
        strengths=strengths,
        positions=torch.arange(5),
        history_lengths=Jagged.from_lengths(torch.tensor([2, 3]), torch.tensor([2])),
        times_s=torch.zeros(2),
    )
    events = Jagged.from_lengths(torch.arange(4), torch.tensor([4]))
    batch = SequenceBatch(user_ids=torch.zeros(1, dtype=torch.int64), items=events, pages=pages)
    # Five items of three codes and two ends; three chosen items; four events with a next item.
    assert [supervised_tokens(batch, target, 3) for target in ("page", "item", "next")] == [17, 9, 12]


def test_steps_give_equal_tokens():
    page = Supervision(tokens_per_step=900.0, events_per_user=50.0)
    item = Supervision(tokens_per_step=250.0, events_per_user=50.0)
    assert equal_steps(100, page, item) == 360
    assert equal_steps(100, page, page) == 100
    assert equal_steps(1, item, page) == 1


def test_the_merger_and_the_targets_are_compared_over_the_seeds_that_both_have():
    runs = [pl.DataFrame({"user_row": [0, 1], "recall@10": [1.0, 0.5], "ndcg@10": [1.0, 0.5]})] * 2
    frames = {
        Variant("page", "on"): runs,
        Variant("page", "off"): runs[:1],
        Variant("item", "on"): runs,
    }
    head, rows = compared(frames, "page")
    assert [(row[0], row[1], row[3]) for row in rows if row[2] == "recall@10"] == [
        ("page-wise, merger off", "page-wise, merger on", "1"),
        ("item-wise, merger on", "page-wise, merger on", "2"),
    ]
    assert all(row[-1] == "yes" and len(row) == len(head) for row in rows)


def test_unknown_variants_are_refused():
    with pytest.raises(ConfigError, match="targets must be of"):
        Options(data="x", ids="y", targets=("pages",))
