import numpy as np
import polars as pl
import pytest

from cluster.errors import DataError
from data_streams.published_ids import read_published

IDS = pl.Series("item_id", [1, 2, 3])
SIDS = [["<a_5>", "<b_70>"], ["<a_0>", "<b_255>"], ["<a_5>", "<b_300>"]]


def write(tmp_path, **columns) -> str:
    path = str(tmp_path / "sids.parquet")
    pl.DataFrame(columns).write_parquet(path)
    return path


def test_texts_are_read_by_their_numbers_and_put_in_order(tmp_path):
    path = write(tmp_path, item_id=pl.Series([3, 1, 2], dtype=pl.Int32), sid=[SIDS[2], SIDS[0], SIDS[1]])
    table = read_published(path, IDS)
    assert table.codes.tolist() == [[5, 70], [0, 255], [5, 300]] and table.codes.dtype == np.int32
    assert table.code_sizes == (256, 301)
    assert table.tokenizer == {"name": "published", "column": "sid"}


def test_numbers_and_given_sizes_are_taken_as_they_are(tmp_path):
    path = write(tmp_path, item_id=[1, 2, 3], one=[[1, 2], [3, 4], [5, 6]], two=SIDS)
    assert read_published(path, IDS, column="one", code_sizes=(8, 8)).code_sizes == (8, 8)
    with pytest.raises(DataError, match=r"level 1 must be 0..5, but 6 is that of item 3"):
        read_published(path, IDS, column="one", code_sizes=(6, 6))


def test_the_column_must_be_clear(tmp_path):
    path = write(tmp_path, item_id=[1, 2, 3], one=SIDS, two=SIDS)
    with pytest.raises(DataError, match="its columns of lists are one, two; choose with --column"):
        read_published(path, IDS)
    with pytest.raises(DataError, match="must have the columns item_id and three"):
        read_published(path, IDS, column="three")
    with pytest.raises(DataError, match="holds Int64"):
        read_published(path, IDS, column="item_id")


def test_codes_without_a_number_and_unreadable_files_are_named(tmp_path):
    path = write(tmp_path, item_id=[1, 2, 3], sid=[SIDS[0], ["<a_x>", "<b_1>"], SIDS[2]])
    with pytest.raises(DataError, match=r"1 items \(2\) have codes without one"):
        read_published(path, IDS)
    with pytest.raises(DataError, match="cannot be read"):
        read_published(str(tmp_path / "absent.parquet"), IDS)
    path = write(tmp_path, item_id=[1, 2, 4], sid=SIDS)
    with pytest.raises(DataError, match=r"lacks 1 items \(3\) and has 1 items \(4\)"):
        read_published(path, IDS)


def test_the_published_ids_of_beauty_have_the_known_collisions(shared_data):
    path = shared_data / "amazon2014_beauty" / "published_sids.parquet"
    ids = pl.Series(range(1, 12_102))
    for column, distinct in (("letter_sid", 12_088), ("iba_sid", 11_868)):
        table = read_published(str(path), ids, column=column)
        assert table.code_sizes == (256,) * 4
        assert len(np.unique(table.codes, axis=0)) == distinct


def test_codes_that_no_table_can_hold_are_named(tmp_path):
    """Cut to 32 bits they would be codes of other items."""
    for large in ([2**32 + 5, 70], ["<a_4294967301>", "<b_70>"], ["<a_99999999999999999999>", "<b_70>"]):
        codes = [large, *([[1, 2], [3, 4]] if isinstance(large[0], int) else SIDS[1:])]
        path = write(tmp_path, item_id=[1, 2, 3], sid=codes)
        for code_sizes in ((), (256, 256)):
            with pytest.raises(
                DataError, match=r"number below 2 \*\* 31 in every code of sid; 1 items \(1\)"
            ):
                read_published(path, IDS, code_sizes=code_sizes)
