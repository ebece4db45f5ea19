"""A data set of a few hundred users and a run on it that takes seconds, for tests of whole runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from cluster.process import Process
from cluster.reporter import Reporter
from cluster.storage import Storage
from data_streams.build import BuildConfig, build
from data_streams.configuration import DataConfig
from data_streams.item_table import ItemTable
from data_streams.semantic_ids import SemanticIdTable
from data_streams.sources.events import EventsSource
from models.objectives.sampled_softmax import SampledSoftmax
from models.sasrec import SASRec
from trainer.configuration import EvaluationConfig, PretrainConfig, TrainConfig

NUM_ITEMS = 60
NUM_USERS = 150


def write_events(
    folder: Path,
    *,
    num_users: int = NUM_USERS,
    first_item: int = 0,
    extra_items: int = 0,
    categories: bool = False,
) -> tuple[Path, Path]:
    """Users who walk along a circle of items, so that the next one can be learnt -> events and items files.

    Categories, where wanted, are sixths of the circle. Extra items are those that nobody has taken.
    """
    random = np.random.default_rng(0)
    rows = []
    for user in range(num_users):
        start, length = random.integers(NUM_ITEMS), random.integers(4, 14)
        steps = np.cumsum(random.integers(1, 3, length)) + start
        rows += [(f"u{user}", f"i{first_item + step % NUM_ITEMS}", place) for place, step in enumerate(steps)]
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "pos"], orient="row")
    numbers = range(NUM_ITEMS + extra_items)
    items = pl.DataFrame(
        {
            "item_id": [f"i{first_item + item}" for item in numbers],
            "title": [f"Title {first_item + item}" for item in numbers],
        }
    )
    if categories:
        parts = [[f"part {item // 10}"] for item in numbers]
        items = items.with_columns(pl.Series("categories", parts))
    folder.mkdir(parents=True, exist_ok=True)
    events.write_parquet(folder / "events.parquet")
    items.write_parquet(folder / "items.parquet")
    return folder / "events.parquet", folder / "items.parquet"


def build_tiny_data(folder: Path, **options: Any) -> str:
    """Shards in `folder`/shards -> their path."""
    events, items = write_events(folder / "raw", **options)
    source = EventsSource.Config(events=(str(events),), items=str(items), order_column="pos")
    build(source, BuildConfig(out=str(folder / "shards"), chunk_users=16, ray="never"))
    return str(folder / "shards")


def save_semantic_ids(data: str, folder: Path, seed: int = 0) -> str:
    """A table of random paths of two codes for the items of shards -> its folder."""
    items = ItemTable.load(data).item_ids
    paths = np.random.default_rng(seed).permutation(100)[: len(items)]
    codes = np.stack((paths // 10, paths % 10), axis=1).astype(np.int32)
    SemanticIdTable(item_ids=items, codes=codes, code_sizes=(10, 10)).save(str(folder))
    return str(folder)


def tiny_config(data: str, run_dir: Path, *, dropout: float = 0.0, **train: Any) -> PretrainConfig:
    chosen = {"epochs": 2, "checkpoint_every_s": None, "warmup_steps": 2, "precision": "fp32", **train}
    return PretrainConfig(
        recipe="tiny",
        run_dir=str(run_dir),
        seed=3,
        data=DataConfig(path=data, max_length=10, tokens_per_step=128, num_streams=6, shuffle_chunks=2),
        model=SASRec.Config(width=16, num_blocks=1, num_heads=2, dropout=dropout),
        objective=SampledSoftmax.Config(num_negatives=32),
        train=TrainConfig(**chosen),
        evaluation=EvaluationConfig(cutoffs=(5, 10), bootstrap_resamples=20),
    )


class StopAfter(Reporter):
    """Asks for a stop once a number of steps were announced."""

    def __init__(self, rank: int, announcements: int | None):
        super().__init__(rank)
        self.left = announcements

    def stop_requested(self) -> bool:
        if self.left is None:
            return False
        self.left -= 1
        return self.left < 0


def run(
    process: Process, config: PretrainConfig, stop_after: int | None = None
) -> tuple[dict[str, Any], list[tuple[str, int, Tensor]]]:
    """Pretrain; the result and this rank's pieces of the state at the end, read back from its checkpoint."""
    from trainer.checkpoint_reader import CheckpointReader
    from trainer.start import pretrain

    # Ranks are told to stop at different steps, as signals do.
    stop = None if stop_after is None else stop_after + process.rank
    result = pretrain(process, config, {}, StopAfter(process.rank, stop))
    reader = CheckpointReader(Storage(f"{config.run_dir}/checkpoints"), "latest")
    state = {name: read_all(reader, name) for name in sorted(reader.tensors)}
    return result, state


def read_all(reader, name: str) -> Tensor:
    shape, _ = reader.tensors[name]
    return reader.read_rows(name, 0, shape[0])


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, atol=tolerance, rtol=1e-4 if tolerance else 0, msg=name
        )


def with_train(config: PretrainConfig, **changes: Any) -> PretrainConfig:
    return replace(config, train=replace(config.train, **changes))
