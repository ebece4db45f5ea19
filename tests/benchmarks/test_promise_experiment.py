"""Plain beams of equal cost, means over runs, and what is compared with what."""

import polars as pl
import pytest

from benchmarks.experiments.promise import (
    COMPARED,
    GUIDED,
    PLAIN,
    WIDER,
    Options,
    compared,
    equal_width,
    mean_lines,
    plain_at,
    scaling_rows,
)
from cluster.errors import ConfigError


def line(kind: str, number: int, gflop: float, recall: float) -> dict:
    return {
        "kind": kind,
        "number": number,
        "gflop_per_user": gflop,
        "ms_per_user": 1.0,
        "recall@10": recall,
    }


LINES = [
    line("plain", 50, 1.0, 0.10),
    line("plain", 100, 2.0, 0.12),
    line("plain", 200, 4.0, 0.13),
    line("prm", 50, 1.25, 0.14),
    line("prm", 200, 3.0, 0.20),
    line("prm", 400, 4.5, 0.21),
]


def test_a_plain_beam_of_equal_cost_lies_between_its_neighbours():
    assert plain_at(LINES, 3.0, "recall@10") == pytest.approx(0.125)
    assert plain_at(LINES[::-1], 1.25, "recall@10") == pytest.approx(0.105)
    assert (equal_width(LINES, 200), equal_width(LINES, 50)) == (150, 62)


def test_beyond_the_plain_beams_that_were_measured_nothing_is_guessed():
    assert plain_at(LINES, 0.5, "recall@10") is None
    assert equal_width(LINES, 400) is None
    rows = scaling_rows(LINES, ["recall@10"])
    assert [row[-1] for row in rows] == [
        *("0.1000", "0.1200", "0.1300"),
        *("0.1400 (0.1050)", "0.2000 (0.1250)", "0.2100"),
    ]


def test_lines_of_several_runs_are_averaged_search_by_search():
    others = [{**each, "gflop_per_user": 3 * each["gflop_per_user"]} for each in LINES]
    means = mean_lines([LINES, others])
    assert [each["gflop_per_user"] for each in means] == [2.0, 4.0, 8.0, 2.5, 6.0, 9.0]
    assert means[4]["kind"] == "prm" and means[4]["number"] == 200
    assert mean_lines([]) == []


def test_the_prm_is_compared_with_both_plain_beams_where_all_seeds_have_them():
    users = pl.DataFrame({"user_row": [0, 1], **{metric: [1.0, 0.5] for metric in COMPARED}})
    found = {PLAIN: [users] * 2, GUIDED: [users] * 2, WIDER: [users] * 2}
    pairs = [(row[0], row[1]) for row in compared(found) if row[2] == "recall@10"]
    assert pairs == [(PLAIN, GUIDED), (PLAIN, WIDER), (WIDER, GUIDED)]
    found[WIDER].pop()
    assert {(row[0], row[1]) for row in compared(found)} == {(PLAIN, GUIDED)}


def test_candidates_must_begin_with_the_width_and_hold_the_number_compared():
    with pytest.raises(ConfigError, match=r"--width must be at least 50, .* got 5"):
        Options(data="x", ids="y", width=5, candidates=(5, 10), guided=10)
    with pytest.raises(ConfigError, match="begin with the width 50"):
        Options(data="x", ids="y", candidates=(100, 200))
    with pytest.raises(ConfigError, match="hold --guided 300"):
        Options(data="x", ids="y", guided=300)
