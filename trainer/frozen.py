"""A trained run as one process uses it that trains nothing: weights on this machine alone, without a process group."""

import sys
from dataclasses import dataclass

import torch

from cluster.storage import Storage
from data_streams.item_table import ItemTable
from data_streams.semantic_ids import SemanticIdTable
from models.recommender import Recommender
from models.tables import Lookup
from sharding.lookup import make_lookup
from sharding.tables import EmbeddingTables
from sharding.unsharded import UnshardedTables
from trainer.assembly import build_model, load_item_features, load_semantic_ids
from trainer.checkpoint_reader import CheckpointReader
from trainer.configuration import CHECKPOINTS, PretrainConfig
from trainer.run_state import load_weights


@dataclass(frozen=True, kw_only=True)
class FrozenRun:
    """Cost: a copy of the run's tables in memory; for tables of a size that one machine holds."""

    config: PretrainConfig
    items: ItemTable
    semantic_ids: SemanticIdTable | None
    model: Recommender
    tables: EmbeddingTables
    lookup: Lookup
    step: int
    device: torch.device
    """Of the model and of what `lookup` returns; ids are looked up from the host."""


def model_class(config: PretrainConfig) -> type:
    """What `load_frozen` will hold: the class that the configuration of the model stands in; nothing is built."""
    form = type(config.model)
    return getattr(sys.modules[form.__module__], form.__qualname__.partition(".")[0])


def frozen_step(config: PretrainConfig, checkpoint: str | int) -> str:
    """The number of the step that `load_frozen` would take now, for all who are to take the same one.

    Raises: CheckpointError if there is no such checkpoint.
    """
    return str(CheckpointReader(Storage(f"{config.run_dir}/{CHECKPOINTS}"), checkpoint).step)


def load_frozen(
    config: PretrainConfig, checkpoint: str | int = "best", device: torch.device | str = "cpu"
) -> FrozenRun:
    """Raises: CheckpointError if there is no such checkpoint, or it belongs to another model."""
    device = torch.device(device)
    reader = CheckpointReader(Storage(f"{config.run_dir}/{CHECKPOINTS}"), checkpoint)
    items = ItemTable.load(config.data.path)
    features = load_item_features(config, items)
    semantic_ids = load_semantic_ids(config, items)
    model = build_model(config, items, features, semantic_ids)
    tables = UnshardedTables(model.all_tables(), seed=config.seed, learning_rate=0.0, device=device)
    frozen = FrozenRun(
        config=config,
        items=items,
        semantic_ids=semantic_ids,
        model=model.eval().to(device),
        tables=tables,
        lookup=make_lookup(model.all_tables(), tables, features, device),
        step=reader.step,
        device=device,
    )
    load_weights(reader, frozen)
    # Only now: what needs no gradient counts as no weight of a checkpoint.
    model.requires_grad_(False)
    return frozen
