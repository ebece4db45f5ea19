"""Everything an optimizer step needs, prepared on the host one step ahead."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from data_streams.batch import SequenceBatch
from data_streams.jagged import moved
from models.recommender import Recommender, StepContext
from models.tables import Ids, TableSpec
from sharding.lookup import ItemFeatures, MergedIds, features_of_request, merge_ids


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The users of one forward and backward."""

    batch: SequenceBatch
    context: StepContext
    ids: Ids
    item_features: Mapping[str, Tensor]
    num_targets: int
    """Supervised targets of this rank."""


@dataclass(frozen=True, kw_only=True)
class StepInput:
    """The users of one step and rank, in micro-batches, and the one lookup they share."""

    step: int
    micro_batches: tuple[MicroBatch, ...]
    merged: MergedIds
    user_ids: Tensor
    """[B] int64 users of this rank, on the host."""
    position: Mapping[str, object] | None
    """Where this rank's streams stand after the step."""

    @property
    def global_count(self) -> int:
        """Supervised targets of all ranks and micro-batches: what the loss is divided by."""
        return sum(sum(micro.context.targets_per_rank) for micro in self.micro_batches)

    def with_counts(self, counts: Sequence[Sequence[int]]) -> "StepInput":
        """Fill in what the ranks told each other: supervised targets [micro-batch][rank]."""
        micro_batches = tuple(
            replace(micro, context=replace(micro.context, targets_per_rank=tuple(per_rank)))
            for micro, per_rank in zip(self.micro_batches, counts, strict=True)
        )
        return replace(self, micro_batches=micro_batches)

    def at(self, position: Mapping[str, object] | None) -> "StepInput":
        """The same step, after which this rank's streams stand at another position."""
        return replace(self, position=position)


def split_users(batch: SequenceBatch, parts: int) -> list[SequenceBatch]:
    """Cut a batch into parts of about equal tokens, between users; parts may be empty."""
    if parts == 1:
        return [batch]
    ends = batch.items.offsets[1:].numpy()
    goals = batch.num_tokens * np.arange(1, parts) / parts
    inner = np.minimum(np.searchsorted(ends, goals) + 1, batch.num_users)
    cuts = [0, *inner.tolist(), batch.num_users]
    return [batch.select(start, stop) for start, stop in pairwise(cuts)]


def prepare_step(
    model: Recommender,
    batch: SequenceBatch,
    context: StepContext,
    num_micro_batches: int,
    item_features: ItemFeatures | None,
    device: torch.device,
) -> StepInput:
    """Ask the model what it looks up, join it, gather frozen features, and send all of it to the device."""
    parts = split_users(model.training_batch(batch, context), num_micro_batches)
    asked = [(part, model.ids(part, context), model.num_targets(part)) for part in parts]
    return join_parts(model.all_tables(), asked, batch, context, item_features, device)


def join_parts(
    specs: Sequence[TableSpec],
    asked: Sequence[tuple[SequenceBatch, Ids, int]],
    batch: SequenceBatch,
    context: StepContext,
    item_features: ItemFeatures | None,
    device: torch.device,
) -> StepInput:
    """The step of a batch whose parts, with what each looks up and its number of targets, are known."""
    merged = merge_ids(specs, [dict(ids) for _, ids, _ in asked])
    micro_batches = []
    for part, ids, num_targets in asked:
        features = features_of_request(item_features, specs, ids)
        micro_batches.append(
            MicroBatch(
                batch=part.to(device),
                num_targets=num_targets,
                context=context,
                ids={name: moved(values, device) for name, values in ids.items()},
                item_features={name: moved(values, device) for name, values in features.items()},
            )
        )
    return StepInput(
        step=context.step,
        micro_batches=tuple(micro_batches),
        merged=merged.to(device),
        user_ids=batch.user_ids,
        position=batch.position,
    )
