import json

import numpy as np
import polars as pl
import pytest

from cluster.errors import CheckpointError, DataError
from data_streams.item_table import catalogue_fingerprint
from data_streams.semantic_ids import SemanticIdTable, named

IDS = pl.Series("item_id", ["a", "b", "c", "d"])
CODES = np.array([[0, 1], [0, 1], [2, 0], [1, 1]], dtype=np.int32)


def make(**changes) -> SemanticIdTable:
    return SemanticIdTable(
        **{
            "item_ids": IDS,
            "codes": CODES,
            "code_sizes": (3, 2),
            "tokenizer": {"name": "by hand", "config": {"sizes": [3, 2]}},
            **changes,
        }
    )


@pytest.mark.parametrize("ids", [IDS, pl.Series("item_id", [7, 3, 9, 1])])
def test_a_table_comes_back_as_it_was_saved(ids, tmp_path):
    table = make(item_ids=ids)
    table.save(str(tmp_path))
    loaded = SemanticIdTable.load(str(tmp_path), ids)
    np.testing.assert_array_equal(loaded.codes, CODES)
    assert loaded.codes.dtype == np.int32 and loaded.code_sizes == (3, 2)
    assert loaded.fingerprint == table.fingerprint and loaded.tokenizer == table.tokenizer
    assert SemanticIdTable.load(str(tmp_path)).item_ids.to_list() == ids.to_list()
    assert pl.read_parquet(tmp_path / "semantic_ids.parquet").columns == ["item_id", "code_0", "code_1"]


def test_codes_of_one_level_may_be_written_to_when_they_are_read_back(tmp_path):
    make(codes=CODES[:, :1], code_sizes=(3,)).save(str(tmp_path))
    assert SemanticIdTable.load(str(tmp_path)).codes.flags.writeable, "torch warns of arrays that are not"


def test_the_fingerprint_changes_with_codes_sizes_items_and_their_order():
    changed = CODES.copy()
    changed[3, 0] = 2
    tables = [
        make(),
        make(codes=changed),
        make(code_sizes=(4, 2)),
        make(item_ids=IDS.reverse()),
        make(item_ids=pl.Series(["a", "b", "c", "e"])),
    ]
    assert len({table.fingerprint for table in tables}) == 5
    assert make(tokenizer={"name": "another"}).fingerprint == tables[0].fingerprint
    assert catalogue_fingerprint(pl.Series([1, 23])) != catalogue_fingerprint(pl.Series([12, 3]))


def test_a_model_refuses_another_table_but_not_an_extension():
    table = make()
    table.require(table.fingerprint)
    other = make(codes=CODES[::-1].copy())
    with pytest.raises(CheckpointError, match=f"trained with the semantic IDs {table.fingerprint}"):
        other.require(table.fingerprint)
    larger = table.extended(pl.Series([*IDS, "e"]), np.array([[2, 1]], dtype=np.int32))
    larger.require(table.fingerprint)
    with pytest.raises(CheckpointError):
        table.require(larger.fingerprint)


def test_an_extension_keeps_the_codes_of_every_item_wherever_it_lies(tmp_path):
    ids = pl.Series(["x", "c", "a", "b", "y", "d"])
    new = np.array([[2, 1], [1, 0]], dtype=np.int32)
    larger = make().extended(ids, new)
    larger.save(str(tmp_path))
    loaded = SemanticIdTable.load(str(tmp_path), ids)
    assert loaded.extends == (make().fingerprint,)
    by_id = dict(zip(ids, loaded.codes.tolist(), strict=True))
    assert [by_id[item] for item in IDS] == CODES.tolist()
    assert by_id["x"] == [2, 1] and by_id["y"] == [1, 0]
    with pytest.raises(DataError, match=r"1 items \(b\) are not in it"):
        make().extended(pl.Series(["a", "c", "d", "e"]), new[:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": np.array([[0, 1], [3, 1], [2, 0], [1, -1]], dtype=np.int32)},
         r"codes of level 0 must be 0..2, but 3 is that of item b; 2 items \(b, d\) have codes out of range"),
        ({"codes": CODES[:3]}, r"need int32 codes 4 x 2, got int32 \(3, 2\)"),
        ({"codes": CODES.astype(np.int64)}, "got int64"),
        ({"item_ids": pl.Series(["a", "b", "a", "d"])}, r"1 items \(a\) occur more than once"),
        ({"item_ids": pl.Series(["a", None, "c", "d"])}, "1 rows without an item id"),
        ({"code_sizes": (), "codes": CODES[:, :0]}, "at least one level"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        make(**changes)


def test_another_catalogue_is_refused_with_its_items(tmp_path):
    make().save(str(tmp_path))
    with pytest.raises(DataError, match=r"lacks 1 items \(e\) and has 1 items \(d\) that the data set"):
        SemanticIdTable.load(str(tmp_path), pl.Series(["a", "b", "c", "e"]))
    with pytest.raises(DataError, match=r"another order, the first at row 1 \(b, in the data set c\)"):
        SemanticIdTable.load(str(tmp_path), pl.Series(["a", "c", "b", "d"]))
    with pytest.raises(DataError, match=r"lacks 1 items \(e\); give"):
        SemanticIdTable.load(str(tmp_path), pl.Series(["a", "b", "c", "d", "e"]))
    with pytest.raises(DataError, match="must have the 2 items of the data set"):
        SemanticIdTable.load(str(tmp_path), pl.Series([1, 2]))


def header(path, **changes) -> None:
    content = json.loads((path / "semantic_ids.json").read_text())
    (path / "semantic_ids.json").write_text(json.dumps({**content, **changes}))


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no semantic_ids.json"):
        SemanticIdTable.load(str(tmp_path))
    make().save(str(tmp_path))
    data = bytearray((tmp_path / "semantic_ids.parquet").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "semantic_ids.parquet").write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"semantic_ids.parquet does not match the checksum of its header"):
        SemanticIdTable.load(str(tmp_path))
    (tmp_path / "semantic_ids.parquet").unlink()
    with pytest.raises(DataError, match=r"semantic_ids.parquet is missing"):
        SemanticIdTable.load(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "has format version 2, this program reads 1"),
        ({"surprise": 1}, "must have the keys"),
        ({"code_sizes": [3, 3]}, "its header says"),
        ({"code_sizes": [3, 2, 2]}, "lacks code_2"),
        ({"code_sizes": [2, 2]}, r"1 items \(c\) have codes out of range"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(changes, message, tmp_path):
    make().save(str(tmp_path))
    header(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        SemanticIdTable.load(str(tmp_path))


def test_a_header_that_is_not_json_is_refused(tmp_path):
    make().save(str(tmp_path))
    (tmp_path / "semantic_ids.json").write_text("[1")
    with pytest.raises(DataError, match="is not JSON"):
        SemanticIdTable.load(str(tmp_path))


def from_frame(ids: list, codes: list) -> SemanticIdTable:
    frame = pl.DataFrame({"item_id": ids, "codes": codes})
    return SemanticIdTable.from_frame(frame, IDS, code_sizes=(3, 2), tokenizer={}, name="the file")


def test_rows_in_any_order_are_brought_into_that_of_the_catalogue():
    table = from_frame(["d", "b", "a", "c"], CODES[[3, 1, 0, 2]].tolist())
    np.testing.assert_array_equal(table.codes, CODES)


@pytest.mark.parametrize(
    ("ids", "codes", "message"),
    [
        (["a", "b", "c"], CODES[:3].tolist(), r"lacks 1 items \(d\); give the table of this catalogue"),
        (["a", "b", "c", "c"], CODES.tolist(), r"the file must have one row per item; 1 items \(c\)"),
        (["a", "b", "c", "z"], CODES.tolist(), r"lacks 1 items \(d\) and has 1 items \(z\)"),
        ([*"abcd"], [[0, 1], [0], [2, 0], None], r"every item 2 codes; 2 items \(b, d\)"),
        ([*"abcd"], [[0, 1], [0, 2], [2, 0], [1, 1]], r"codes of level 1 must be 0..1, but 2 .* item b"),
    ],
)
def test_rows_that_do_not_fit_the_catalogue_are_refused(ids, codes, message):
    with pytest.raises(DataError, match=message):
        from_frame(ids, codes)


def test_many_items_are_named_by_a_few():
    assert named(pl.Series([5, 6, 7, 8])) == "4 items (5, 6, 7, ...)"
