"""Floating-point operations of a training step, counted from the operations that really run, without running them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.layers.feedforward import FeedForwardConfig
from models.layers.moe import MixtureConfig
from models.recommender import Recommender, StepContext
from models.semantic_ids import SemanticIds
from models.tables import LookedUp

META = torch.device("meta")


def build_on_meta(
    config, *, code_sizes: tuple[int, ...], max_length: int, num_items: int = 100
) -> Recommender:
    """A generating model of any size, without memory for its weights."""
    with META:
        codes = torch.zeros(num_items, len(code_sizes), dtype=torch.int64)
        return config.build(
            num_items=num_items,
            max_length=max_length,
            item_feature_dim=0,
            actions=("click", "like"),
            semantic_ids=SemanticIds(codes=codes, code_sizes=code_sizes),
        )


def dense_of_active_size(config: Any) -> Any:
    """The configuration of a model with dense layers of the size that a token visits in the place of experts."""
    visited = {
        name: FeedForwardConfig(hidden=(part.top_k + part.num_shared) * part.hidden)
        for name, part in vars(config).items()
        if isinstance(part, MixtureConfig)
    }
    return replace(config, **visited)


def made_up_batch(lengths: list[int]) -> SequenceBatch:
    """Users with as many events each, all of item 0."""
    events = torch.zeros(sum(lengths), dtype=torch.int64)
    return SequenceBatch(
        user_ids=torch.arange(len(lengths)),
        items=Jagged.from_lengths(events, torch.tensor(lengths)),
        targets=events,
    )


def training_flops(model: Recommender, batch: SequenceBatch) -> int:
    """Forward and backward of one step of a model on the meta device; two for each multiplication and addition."""
    context = StepContext(step=0)
    batch = model.training_batch(batch, context)
    dims = {feature: spec.dim for spec in model.tables() for feature in spec.features}
    rows = {
        name: LookedUp(ids=ids.to(META), rows=_leaf(len(ids), dims[name]))
        for name, ids in model.ids(batch, context).items()
    }
    batch = batch.to(META)
    with FlopCounterMode(display=False) as counter:
        model(rows, batch, context).sum.backward()
    return counter.get_total_flops()


def _leaf(count: int, dim: int) -> Tensor:
    return torch.zeros(count, dim, device=META, requires_grad=True)
