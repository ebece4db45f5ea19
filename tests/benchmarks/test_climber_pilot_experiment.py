"""What Climber-Pilot's variants are compared with, and recall against the hidden seconds."""

import polars as pl

from benchmarks.experiments.climber_pilot import FILTERED, Options, Variant, compared, curves

OPTIONS = Options(data="x", branches=(2, 1), windows_s=("None", "0", "900"), lags_s=(0.0, 900.0))


def users(*recall: float) -> pl.DataFrame:
    return pl.DataFrame({"user_row": range(len(recall)), "recall@10": recall, "recall@50": recall})


def test_two_branches_are_compared_with_one_at_the_same_window_and_delay():
    found = {
        Variant(1, "None", 0.0): [users(0.5, 0.5)] * 2,
        Variant(1, "None", 900.0): [users(0.2, 0.2)],
        Variant(2, "None", 0.0): [users(0.6, 0.5)],
        Variant(2, "900", 0.0): [users(0.1, 0.1)],
    }
    head, rows = compared(found, OPTIONS)
    assert [row[:5] for row in rows] == [
        [str(Variant(1, "None", 0.0)), str(Variant(2, "None", 0.0)), metric, "1", "+0.0500"]
        for metric in ("recall@10", "recall@50")
    ]
    assert all(len(row) == len(head) for row in rows)


def test_conditions_are_compared_with_filtering():
    met = pl.lit(1.0).alias("condition@10")
    found = {FILTERED: [users(0.5).with_columns(met)], "condition attention": [users(0.75).with_columns(met)]}
    rows = compared(found, OPTIONS)[1]
    assert [row[:2] for row in rows] == [[FILTERED, "condition attention"]] * 3
    assert [row[4] for row in rows] == ["+0.2500", "+0.2500", "+0.0000"]


def test_recall_is_drawn_against_the_hidden_seconds_of_each_number_of_branches_and_delay():
    found = {
        Variant(1, "900", 0.0): [users(0.1, 0.3), users(0.3, 0.5)],
        Variant(1, "None", 0.0): [users(0.5, 0.5)],
        Variant(1, "0", 0.0): [users(0.5, 0.3)],
        Variant(2, "None", 900.0): [users(0.2, 0.2)],
        FILTERED: [users(1.0, 1.0)],
    }
    assert curves(found, "recall@10") == {
        (1, 0.0): [(0.0, [0.5]), (0.5, [0.4]), (900.0, [0.2, 0.4])],
        (2, 900.0): [(0.0, [0.2])],
    }
