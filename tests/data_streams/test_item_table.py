"""The item table of a data set."""

import hashlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cluster.errors import DataError
from data_streams.item_table import ItemTable, shown_title
from tests.data_streams.tiny_data import make_chunk, write_data_set

FRAME = pl.DataFrame(
    {
        "item_id": [10, 20, 30],
        "title": ["soap", None, "comb"],
        "categories": [["bath"], [], ["hair", "wood"]],
        "train_count": [5, 0, 2],
    }
)


def write(path: Path, frame: pl.DataFrame = FRAME, **manifest) -> Path:
    write_data_set(path, make_chunk([3]), **{"num_items": 3, **manifest})
    frame.write_parquet(path / "items.parquet")
    return path


def test_items_are_loaded_by_row_with_ids_in_place_of_missing_titles(tmp_path):
    table = ItemTable.load(str(write(tmp_path)))
    assert table.num_items == 3
    assert table.item_ids.to_list() == [10, 20, 30]
    assert table.titles.to_list() == ["soap", "20", "comb"]
    assert table.categories.to_list() == [["bath"], [], ["hair", "wood"]]
    assert table.train_counts.dtype == np.int64
    assert table.train_counts.tolist() == [5, 0, 2]
    assert table.embeddings is None


def test_titles_and_categories_may_be_absent(tmp_path):
    table = ItemTable.load(str(write(tmp_path, FRAME.drop("title", "categories"))))
    assert table.titles.to_list() == ["10", "20", "30"]
    assert table.categories is None


def test_a_title_is_shown_as_one_line_that_ends_somewhere():
    assert shown_title("soap\nof  the day\t") == "soap of the day"
    assert shown_title("長い" * 40) == "長い" * 40
    assert shown_title("長い" * 41) == "長い" * 39 + "長…"


def test_embeddings_are_mapped_not_read(tmp_path):
    matrix = np.arange(6, dtype=np.float16).reshape(3, 2)
    np.save(write(tmp_path) / "item_embeddings.npy", matrix)
    embeddings = ItemTable.load(str(tmp_path)).embeddings
    assert isinstance(embeddings, np.memmap)
    np.testing.assert_array_equal(embeddings, matrix)


def test_a_catalogue_of_another_build_is_refused(tmp_path):
    write(tmp_path)
    checksum = hashlib.sha256((tmp_path / "items.parquet").read_bytes()).hexdigest()
    assert ItemTable.load(str(write(tmp_path, catalogue_sha256=checksum))).num_items == 3
    write(tmp_path, FRAME.with_columns(item_id=pl.col("item_id") + 1), catalogue_sha256=checksum)
    with pytest.raises(DataError, match=r"items.parquet is not the file the manifest was written with"):
        ItemTable.load(str(tmp_path))


def test_a_missing_or_damaged_catalogue_is_named(tmp_path):
    (write(tmp_path) / "items.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"items.parquet is not a Parquet file"):
        ItemTable.load(str(tmp_path))
    (tmp_path / "items.parquet").unlink()
    with pytest.raises(DataError, match=r"items.parquet is missing; copy it again or build"):
        ItemTable.load(str(tmp_path))


def test_missing_columns_and_rows_are_named(tmp_path):
    with pytest.raises(DataError, match="lacks the columns train_count"):
        ItemTable.load(str(write(tmp_path, FRAME.drop("train_count"))))
    with pytest.raises(DataError, match="must have 4 rows, as the manifest says, has 3"):
        ItemTable.load(str(write(tmp_path, num_items=4)))


BAD_EMBEDDINGS = {
    "rows": (
        np.zeros((2, 4), dtype=np.float32),
        r"one float16 or float32 vector for each of 3 items.*\(2, 4\)",
    ),
    "type": (np.zeros((3, 4), dtype=np.int32), "float16 or float32 vector .* is int32"),
    "infinite": (
        np.array([[0.0], [np.inf], [0.0]], dtype=np.float32),
        "1 of 3 sampled .* the first at row 1",
    ),
    "objects": (np.array([["a"], [None], [{}]], dtype=object), "is not a plain NumPy array"),
}


@pytest.mark.parametrize("case", BAD_EMBEDDINGS)
def test_unfit_embeddings_are_refused(case, tmp_path):
    matrix, message = BAD_EMBEDDINGS[case]
    np.save(write(tmp_path) / "item_embeddings.npy", matrix, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        ItemTable.load(str(tmp_path))


def test_embeddings_the_manifest_promises_must_be_there(tmp_path):
    write(tmp_path, embedding={"dim": 4})
    with pytest.raises(DataError, match=r"item_embeddings.npy is missing"):
        ItemTable.load(str(tmp_path))
