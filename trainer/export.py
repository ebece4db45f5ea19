"""Taking a checkpoint out of grail: safetensors and Parquet files that other programs read."""

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cluster.errors import CheckpointError
from cluster.storage import renamed_at_end
from trainer.checkpoint_reader import CheckpointReader
from trainer.weight_average import served_prefix

TABLE = "table/"
DENSE_NAME = "model.safetensors"
_TABLES = "tables"
"""Names of the tables beside the dense weights, in their file's metadata."""
_CHUNK_BYTES = 16 << 20


def export_checkpoint(
    reader: CheckpointReader,
    out: str | Path,
    *,
    row_ids: Mapping[str, Sequence[Any] | pa.Array] | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Write the dense weights to `model.safetensors` and each table to `NAME.parquet`; returns the files.

    Where the run kept a moving average of the weights, that is what is written. A table has the columns `row`,
    `item_id` (where `row_ids` has the raw ids of its rows, by table name) and `vector`. The dense
    weights must fit into memory; tables are written in parts. Tables of an export that was there before and that this
    checkpoint does not have are removed.

    Raises: CheckpointError for a damaged checkpoint, or row ids of another number than the table's rows.
    """
    folder, row_ids = Path(out), row_ids or {}
    folder.mkdir(parents=True, exist_ok=True)
    dense = folder / DENSE_NAME
    before = _tables_beside(dense)
    names = sorted(name.removeprefix(TABLE) for name in reader.tensors if name.startswith(TABLE))
    files = [_export_dense(reader, dense, names)]
    for name in names:
        path = folder / f"{name}.parquet"
        files.append(_export_table(reader, TABLE + name, path, row_ids.get(name), console))
    for name in before - {*names}:
        (folder / f"{name}.parquet").unlink(missing_ok=True)
    return files


def _tables_beside(dense: Path) -> set[str]:
    """Tables of the export that a file of dense weights is of; none where there is none."""
    try:
        with safe_open(dense, framework="pt") as file:
            names = json.loads((file.metadata() or {}).get(_TABLES, "[]"))
    except (OSError, SafetensorError):
        return set()
    return {name for name in names if Path(name).name == name}


def _export_dense(reader: CheckpointReader, path: Path, tables: Sequence[str]) -> Path:
    if "dense_shapes" not in reader.shared_state:
        raise CheckpointError(
            f"the checkpoint of step {reader.step} must name the shapes of its dense weights "
            "(dense_shapes in state.json) but does not; it was not written by a training run."
        )
    weights, prefix = {}, served_prefix(reader.tensors)
    for name, shape in reader.shared_state["dense_shapes"].items():
        flat = reader.read_rows(prefix + name, 0, prod(shape))
        weights[name] = flat.reshape(shape)
    with renamed_at_end(path) as temporary:
        metadata = {"step": str(reader.step), "format": "pt", _TABLES: json.dumps(tables)}
        save_file(weights, temporary, metadata=metadata)
    return path


def _export_table(
    reader: CheckpointReader,
    name: str,
    path: Path,
    ids: Sequence[Any] | pa.Array | None,
    console: Console | None,
) -> Path:
    (num_rows, dim), dtype = reader.tensors[name]
    if ids is not None and len(ids) != num_rows:
        raise CheckpointError(
            f"{name} has {num_rows} rows but {len(ids)} ids were given; give one id per row."
        )
    ids = pa.array(ids) if ids is not None else None
    # Parquet has no 16-bit brain floats.
    value_type = pa.float64() if dtype == torch.float64 else pa.float32()
    fields = [("row", pa.int64()), ("vector", pa.list_(value_type, dim))]
    if ids is not None:
        fields.insert(1, ("item_id", ids.type))
    schema = pa.schema(fields)
    rows_per_part = max(1, _CHUNK_BYTES // (dim * 4))
    starts = range(0, num_rows, rows_per_part)
    with renamed_at_end(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for start in track(starts, description=f"Writing {path.name}", console=console):
            stop = min(start + rows_per_part, num_rows)
            flat = reader.read_rows(name, start, stop).reshape(-1)
            values = pa.array((flat if dtype == torch.float64 else flat.float()).numpy())
            columns = {
                "row": pa.array(range(start, stop)),
                "vector": pa.FixedSizeListArray.from_arrays(values, dim),
            }
            if ids is not None:
                columns["item_id"] = ids.slice(start, stop - start)
            writer.write_table(pa.table(columns, schema=schema))
    return path


def inspect_checkpoint(reader: CheckpointReader) -> Table:
    """A printable table of what a checkpoint holds."""
    state, progress = reader.shared_state, reader.shared_state.get("progress", {})
    plain = {key: value for key, value in state.items() if isinstance(value, int | float | str)}
    told = {name: progress[name] for name in ("epoch", "status") if name in progress}
    facts = {"step": reader.step, "workers": reader.world_size, **told, **plain}
    table = Table(
        title=", ".join(f"{name} {value}" for name, value in facts.items()),
        caption=_best_line(progress),
    )
    table.add_column("tensor", overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("type")
    table.add_column("MB", justify="right")
    total = 0
    for name, (shape, dtype) in sorted(reader.tensors.items()):
        num_bytes = prod(shape) * dtype.itemsize
        total += num_bytes
        kind = str(dtype).removeprefix("torch.")
        table.add_row(name, " x ".join(map(str, shape)) or "scalar", kind, f"{num_bytes / 1e6:,.2f}")
    table.add_section()
    table.add_row(f"{len(reader.tensors)} tensors", "", "", f"{total / 1e6:,.2f}")
    return table


def _best_line(progress: Mapping[str, Any]) -> str | None:
    if progress.get("best") is None:
        return None
    return f"best validation {progress['best']:.4f}, at step {progress['best_step']}"
