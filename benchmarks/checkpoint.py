"""How long a checkpoint holds the training thread, against one memcpy of the rank's own state."""

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from benchmarks.setting.benchmark import Bar, Benchmark, Request, compare_times
from benchmarks.setting.recipe import recipe_config
from benchmarks.setting.timing import interleave
from cluster.process import Process
from cluster.storage import Storage
from data_streams.item_table import ItemTable
from models.sasrec import SASRec
from sharding.state import Piece
from trainer.assembly import Assembly, assemble
from trainer.checkpoint import Checkpointer
from trainer.run_state import Progress, save_progress
from trainer.start import make_learner

# One thread, as each of two workers on two cores has; one already moves what the memory can.
BENCHMARK = Benchmark(unit="s held", bars=(Bar(key="ratio", at_most=1.5),), threads_per_rank=1)
ROUNDS = {"full": 7, "small": 2}
NUM_ROWS = {"full": 2_000_000, "small": 2_000}
# 10 blocks of 2 x 64 x 15,500 weights: 20 M dense parameters.
NUM_BLOCKS = {"full": 10, "small": 1}
FEEDFORWARD_WIDTH = {"full": 15_500, "small": 100}


def measure(process: Process, request: Request) -> dict[str, Any]:
    """Saves exactly as the training loop does; each save finds the previous one written."""
    assembly = _assemble(process, request)
    learner, _ = make_learner(assembly)
    checkpointer = Checkpointer(
        Storage(Path(request.scratch) / "checkpoints"), rank=0, world_size=1, attempt="benchmark", keep_last=1
    )
    pieces = [*assembly.tables.pieces(), *learner.engine.pieces()]
    _touch(pieces)
    checkpointer.prepare(pieces)
    buffers, steps = [_touched_buffer(piece) for piece in pieces], count(1)

    def save() -> None:
        progress = Progress(step=next(steps))
        save_progress(checkpointer, assembly, learner.engine, progress, {}, best=False)

    def copy() -> None:
        for buffer, piece in zip(buffers, pieces, strict=True):
            buffer.copy_(piece.tensor)

    timings = interleave(
        process, {"ours": save, "peer": copy}, rounds=ROUNDS[request.scale], settle=checkpointer.wait
    )
    checkpointer.close()
    return {
        **compare_times(timings["ours"], timings["peer"]),
        "state_bytes": sum(piece.tensor.nbytes for piece in pieces),
        "dense_parameters": sum(parameter.numel() for parameter in assembly.model.parameters()),
        "table_rows": NUM_ROWS[request.scale],
    }


def _assemble(process: Process, request: Request) -> Assembly:
    """A SASRec with a wide feed-forward part and many items, without their data."""
    config = recipe_config(request.data)
    model = SASRec.Config(
        width=64,
        num_blocks=NUM_BLOCKS[request.scale],
        feedforward_width=FEEDFORWARD_WIDTH[request.scale],
    )
    ids = pl.Series("item_id", np.arange(NUM_ROWS[request.scale]))
    items = ItemTable(
        item_ids=ids,
        titles=ids.cast(pl.String),
        categories=None,
        train_counts=np.zeros(len(ids), dtype=np.int64),
        embeddings=None,
    )
    return assemble(replace(config, model=model), process, items)


def _touch(pieces: list[Piece]) -> None:
    """Fresh zeros may all lie on one physical page, which would be read from the cache."""
    for piece in pieces:
        piece.tensor.uniform_()


def _touched_buffer(piece: Piece) -> torch.Tensor:
    return torch.ones_like(piece.tensor)
