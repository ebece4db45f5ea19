from io import StringIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from cluster.errors import CheckpointError
from cluster.storage import Storage
from tests.trainer.checkpoint_job import Job
from trainer import export
from trainer.checkpoint_reader import CheckpointReader
from trainer.export import export_checkpoint, inspect_checkpoint
from trainer.run_state import Progress

WEIGHT = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
TABLE = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))


def save(folder, *, tables=("item",), **shared_state) -> CheckpointReader:
    state = {
        "dense/encoder.weight": WEIGHT.flatten(),
        "dense/scale": torch.tensor([0.5]),
        "dense_exp_avg/scale": torch.zeros(1),
        **{f"table/{name}": TABLE for name in tables},
        **{f"table_state/{name}": torch.zeros(50) for name in tables},
    }
    Job(Storage(folder), 3).save(8, state, **shared_state)
    return CheckpointReader(Storage(folder))


SHAPES = {"encoder.weight": [6, 4], "scale": []}


def test_weights_and_tables_can_be_read_by_other_programs(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_CHUNK_BYTES", 16 * 7)
    reader = save(tmp_path / "run", dense_shapes=SHAPES)
    ids = [f"B{row:04d}" for row in range(50)]
    console = Console(quiet=True)
    files = export_checkpoint(reader, tmp_path / "out", row_ids={"item": ids}, console=console)
    assert [file.name for file in files] == ["model.safetensors", "item.parquet"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["item.parquet", "model.safetensors"]
    weights = load_file(files[0])
    assert weights.keys() == SHAPES.keys() and weights["scale"].shape == ()
    assert torch.equal(weights["encoder.weight"], WEIGHT)
    table = pq.read_table(files[1])
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 4)
    assert table["row"].to_pylist() == list(range(50)) and table["item_id"].to_pylist() == ids
    assert torch.equal(torch.tensor(table["vector"].to_pylist()), TABLE)
    assert pq.ParquetFile(files[1]).num_row_groups == 8, "tables are written in parts"


def test_a_table_without_raw_ids_has_rows_and_vectors_only(tmp_path):
    files = export_checkpoint(
        save(tmp_path, dense_shapes=SHAPES), tmp_path / "out", console=Console(quiet=True)
    )
    assert pq.read_table(files[1]).column_names == ["row", "vector"]


def test_an_export_leaves_no_table_of_another_run_s_export_and_every_other_file(tmp_path):
    out, console = tmp_path / "out", Console(quiet=True)
    out.mkdir()
    (out / "items.parquet").touch()
    (out / "model.safetensors").write_text("not one of ours")
    export_checkpoint(
        save(tmp_path / "a", tables=("item", "node"), dense_shapes=SHAPES), out, console=console
    )
    assert (out / "node.parquet").exists()
    export_checkpoint(save(tmp_path / "b", dense_shapes=SHAPES), out, console=console)
    names = sorted(file.name for file in out.iterdir())
    assert names == ["item.parquet", "items.parquet", "model.safetensors"]


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="must name the shapes of its dense weights"):
        export_checkpoint(save(tmp_path / "a"), tmp_path / "out")
    reader = save(tmp_path / "b", dense_shapes=SHAPES)
    with pytest.raises(CheckpointError, match="table/item has 50 rows but 3 ids were given"):
        export_checkpoint(reader, tmp_path / "out", row_ids={"item": [1, 2, 3]})
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_a_damaged_table_leaves_no_half_written_file(tmp_path):
    reader = save(tmp_path, dense_shapes={})
    damaged = tmp_path / "step-00000008" / "rank-00002.bin"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    with pytest.raises(CheckpointError, match=r"rank-00002\.bin"):
        export_checkpoint(reader, tmp_path / "out", console=Console(quiet=True))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_inspection_prints_step_epoch_workers_best_and_tensors(tmp_path):
    console = Console(width=120, file=StringIO())
    progress = Progress(step=8, epoch=3, best=0.05961, best_step=6).shared()
    console.print(inspect_checkpoint(save(tmp_path, progress=progress)))
    lines = console.file.getvalue()
    for text in (
        "step 8",
        "workers 3",
        "epoch 3",
        "best validation 0.0596, at step 6",
        "table/item",
        "50 x 4",
        "bfloat16",
        "5 tensors",
    ):
        assert text in lines, text
