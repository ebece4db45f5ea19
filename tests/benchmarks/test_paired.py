"""Comparisons user by user, and the tables of experiments."""

import math

import polars as pl
import pytest

from benchmarks.setting.paired import paired_change
from benchmarks.setting.report import Table, mean_cells
from cluster.errors import DataError


def users(*values: float, first: int = 0) -> pl.DataFrame:
    return pl.DataFrame({"user_row": range(first, first + len(values)), "recall@10": values})


def test_a_change_is_the_mean_over_seeds_of_differences_by_user():
    change = paired_change([users(1, 0, 1, 1), users(0, 1, 1, 0)], [users(0, 0, 1, 1)], "recall@10")
    # Means over seeds .5 .5 1 .5 against 0 0 1 1.
    assert change.mean == pytest.approx(0.625 - 0.5)
    low, high = change.interval
    # Differences are .5 .5 0 -.5: no mean of four draws leaves those bounds.
    assert -0.5 <= low < 0.125 < high <= 0.5


def test_pairs_of_equal_users_have_no_interval_however_much_users_differ():
    before = users(*(0.1 * place for place in range(1, 11)))
    after = before.with_columns(pl.col("recall@10") * 0.98)
    change = paired_change([after], [before], "recall@10")
    assert change.relative == pytest.approx(-0.02)
    assert change.relative_interval == pytest.approx((-0.02, -0.02), abs=1e-5)
    assert change.excludes_loss(0.03) and not change.excludes_loss(0.01)
    assert change.as_share() == "-2.0% (-2.0% to -2.0%)"


def test_nothing_found_before_gives_no_share_and_excludes_no_loss():
    change = paired_change([users(1, 0)], [users(0, 0)], "recall@10")
    assert change.mean == 0.5 and math.isnan(change.relative)
    assert change.as_share() == "" and not change.excludes_loss(0.03)


def test_other_users_are_refused():
    with pytest.raises(DataError, match="same users"):
        paired_change([users(1, 0)], [users(1, 0, first=5)], "recall@10")


def test_tables_are_markdown_with_empty_cells_for_what_was_not_measured():
    cells = mean_cells([users(1, 0), users(1, 1)], ["recall@10", "ndcg@10"])
    assert cells == ["0.7500", ""]
    assert str(Table(["a", "b"], [cells])) == "| a | b |\n| --- | --- |\n| 0.7500 |  |"
