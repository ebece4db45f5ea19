import math

import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from cluster.errors import DataError
from cluster.storage import Storage
from data_streams.semantic_id_report import SemanticIdReport, category_codes, measure, plot, render
from data_streams.semantic_ids import SemanticIdTable

CODES = np.array([[0, 0], [0, 0], [0, 1], [1, 1], [1, 1], [1, 1]], dtype=np.int32)


def table(codes: np.ndarray = CODES, sizes: tuple[int, ...] = (2, 4)) -> SemanticIdTable:
    return SemanticIdTable(item_ids=pl.Series(range(len(codes))), codes=codes, code_sizes=sizes)


def test_the_numbers_of_six_items_are_those_by_hand():
    report = measure(table(), name="hand", categories=np.array([0, 0, 1, 1, 1, 0]), reconstruction_error=0.5)
    assert report.collision_rate == pytest.approx(5 / 6)
    assert report.unique_rate == pytest.approx(3 / 6)
    assert (report.mean_group, report.max_group) == (2.0, 3)
    assert report.usage == [1.0, 0.5] and not report.usage_met
    assert report.entropy[0] == pytest.approx(math.log(2))
    assert report.entropy[1] == pytest.approx(-(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3))
    assert report.purity == pytest.approx([(2 + 2) / 6, (2 + 1 + 2) / 6])
    assert report.remaining_collision_rate == report.collision_rate


def test_an_extra_level_is_left_out_of_all_but_the_remaining_collisions():
    extra = np.array([0, 1, 0, 0, 1, 1])
    report = measure(
        table(np.column_stack([CODES, extra]).astype(np.int32), (2, 4, 3)), name="x", extra_level=True
    )
    assert report.collision_rate == pytest.approx(5 / 6)
    assert report.remaining_collision_rate == pytest.approx(2 / 6)
    assert len(report.usage) == 2 and report.purity is None and report.random_purity is None


def test_shuffled_categories_show_what_chance_gives():
    random = np.random.default_rng(0)
    categories = random.integers(0, 4, 4000)
    codes = np.column_stack([categories, random.integers(0, 4, 4000)]).astype(np.int32)
    report = measure(table(codes, (4, 4)), name="x", categories=categories)
    assert report.purity == [1.0, 1.0]
    assert all(0.25 < value < 0.35 for value in report.random_purity)
    unknown = np.where(np.arange(4000) < 2000, categories, -1)
    assert measure(table(codes, (4, 4)), name="x", categories=unknown).purity == [1.0, 1.0]


def test_the_first_place_that_tells_items_apart_is_the_category():
    lists = pl.Series([["Shop", "Hair", "Combs"], ["Shop", "Skin"], ["Shop"], ["Shop", "Hair"]])
    assert category_codes(lists).tolist() == [0, 1, -1, 0]
    nameless = pl.Series([*lists.to_list(), [], None], dtype=lists.dtype)
    assert category_codes(nameless).tolist() == [0, 1, -1, 0, -1, -1]
    assert category_codes(lists, level=0).tolist() == [0, 0, 0, 0]
    assert category_codes(lists, level=2).tolist() == [0, -1, -1, -1]
    assert category_codes(lists, level=5) is None
    assert category_codes(pl.Series([[], []], dtype=pl.List(pl.String))) is None


def test_reports_are_saved_printed_and_drawn_side_by_side(tmp_path):
    first = measure(table(), name="one", categories=np.array([0, 0, 1, 1, 1, 0]), reconstruction_error=0.25)
    second = measure(table(CODES[:, :1].copy(), (2,)), name="two[/2]")
    first.save(Storage(tmp_path))
    assert SemanticIdReport.load(Storage(tmp_path)) == first
    console = Console(width=120, record=True, file=open(tmp_path / "printed", "w"))
    console.print(render([first, second]))
    printed = console.export_text()
    for text in ("one", "two[/2]", "83.33%", "0.2500", "NOT MET", "met", "2 x 4", first.fingerprint):
        assert text in printed
    assert plot([first, second]).startswith(b"\x89PNG")


def test_tables_in_folders_of_one_name_have_a_bar_each(monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plot([measure(table(), name="ids"), measure(table(CODES[:, :1].copy(), (2,)), name="ids")])
    collisions = drawn[0].axes[0]
    assert len({bar.get_y() for bar in collisions.patches}) == 2
    assert [label.get_text() for label in collisions.get_yticklabels()] == ["ids", "ids"]


def test_a_folder_without_a_report_is_named(tmp_path):
    with pytest.raises(DataError, match=r"must hold the report.json"):
        SemanticIdReport.load(Storage(tmp_path))
    (tmp_path / "report.json").write_text('{"name": "half"}')
    with pytest.raises(DataError, match=r"must hold the report.json"):
        SemanticIdReport.load(Storage(tmp_path))
