"""Write a checkpoint as safetensors and Parquet: grail checkpoint export RUN_DIR [--out DIR]"""

import io
from dataclasses import dataclass

from cluster.storage import Storage
from launch.run_directory import CHECKPOINTS, local_file, parse_checkpoint
from launch.served_run import parse_served

ITEMS_NAME = "items.parquet"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a checkpoint as safetensors and Parquet."""

    checkpoint: str = "best"
    """latest, best or the number of a step."""
    out: str = ""
    """Folder for model.safetensors and a Parquet file per table; left out, RUN_DIR/export."""


def run(arguments: list[str]) -> int:
    config, options = parse_served("checkpoint export", arguments, ExportOptions)
    out = local_file(options.out or f"{config.run_dir}/export", "--out")
    import polars as pl
    from rich.console import Console

    from trainer.checkpoint_reader import CheckpointReader
    from trainer.export import export_checkpoint

    run_files = Storage(config.run_dir)
    reader = CheckpointReader(run_files.folder(CHECKPOINTS), parse_checkpoint(options.checkpoint))
    row_ids = {}
    if run_files.exists(ITEMS_NAME):
        items = pl.read_parquet(io.BytesIO(run_files.read(ITEMS_NAME)), columns=["item_id"])
        row_ids = {"item": items["item_id"].to_arrow()}
    for path in export_checkpoint(reader, out, row_ids=row_ids, console=Console(stderr=True)):
        print(path)
    return 0
