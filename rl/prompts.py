"""Prompts out of training users: the history before a user's last page or event, and what the user then took.

Shapes: B users, T history events, P observed positives.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data_streams.batch import CLICKED, SequenceBatch
from data_streams.jagged import Jagged, gather_ranges
from models.generator import Generator
from models.recommender import StepContext
from rl.types import Prompts
from trainer.feed import Feed
from trainer.step_input import StepInput, join_parts, split_users

POSITIVES = "positives/"
"""Item rows of the observed positives among the supervision of a batch of prompts; with a column's name behind it, that
column of theirs."""


def prompt_batch(batch: SequenceBatch) -> SequenceBatch:
    """The users of a training batch as prompts: of the last page, where they have any, else of the last event.

    The positives of a page are what was clicked or ordered on it (D+ of GRPO-SR).
    """
    last, ends = batch.items.offsets[1:] - 1, batch.items.offsets[1:]
    positives = Jagged.from_lengths(batch.targets[last], torch.ones_like(last))
    supervision = {
        POSITIVES + name: positives.with_values(values[last])
        for name, values in batch.target_features.items()
    }
    if batch.pages is not None:
        ends, positives = _before_last_page(batch, positives)
        supervision = {}
    lengths = ends - batch.items.offsets[:-1]
    kept = torch.from_numpy(gather_ranges(batch.items.offsets[:-1].numpy(), lengths.numpy()))
    return SequenceBatch(
        user_ids=batch.user_ids,
        items=Jagged.from_lengths(batch.items.values[kept], lengths),
        features={name: values[kept] for name, values in batch.features.items()},
        supervision={**supervision, POSITIVES: positives},
        position=batch.position,
    )


def _before_last_page(batch: SequenceBatch, last_targets: Jagged) -> tuple[Tensor, Jagged]:
    """Where each history ends, and the positives behind it. Shapes: [B], B rows."""
    pages, num_pages = batch.pages, batch.pages.history_lengths.lengths
    last = (batch.pages.history_lengths.offsets[1:] - 1).clamp(min=0)
    is_chosen = pages.strengths >= CLICKED
    chosen = Jagged.from_lengths(
        pages.items.values[is_chosen],
        torch.zeros(pages.num_pages, dtype=torch.int64).index_add_(
            0, pages.items.row_index(), is_chosen.long()
        ),
    )
    ends, lengths = batch.items.offsets[1:].clone(), last_targets.lengths.clone()
    starts = last_targets.offsets[:-1] + len(chosen.values)
    with_page = num_pages > 0
    pages_of = last[with_page]
    ends[with_page] = batch.items.offsets[:-1][with_page] + pages.history_lengths.values[pages_of]
    starts[with_page], lengths[with_page] = chosen.offsets[pages_of], chosen.lengths[pages_of]
    values = torch.cat((chosen.values, last_targets.values))
    index = torch.from_numpy(gather_ranges(starts.numpy(), lengths.numpy()))
    return ends, Jagged.from_lengths(values[index], lengths)


def to_prompts(batch: SequenceBatch, serials: Tensor, item_codes: Tensor) -> Prompts:
    """The same users as rewards see them. Shapes: serials [B] int64, item_codes [N, L]."""
    positives = batch.supervision[POSITIVES]
    return Prompts(
        serials=serials.numpy(),
        user_rows=batch.user_ids.numpy(),
        history=batch.items.values.numpy(),
        history_offsets=batch.items.offsets.numpy(),
        positives=positives.values.numpy(),
        positive_offsets=positives.offsets.numpy(),
        positive_paths=item_codes[positives.values].long().numpy(),
        history_features={name: values.numpy() for name, values in batch.features.items()},
        positive_features={
            name.removeprefix(POSITIVES): rows.values.numpy()
            for name, rows in batch.supervision.items()
            if name != POSITIVES
        },
    )


def to_batch(prompts: Prompts) -> SequenceBatch:
    """What a generator reads of prompts."""
    lengths = torch.from_numpy(np.diff(prompts.history_offsets))
    return SequenceBatch(
        user_ids=torch.from_numpy(prompts.user_rows),
        items=Jagged.from_lengths(torch.from_numpy(prompts.history), lengths),
        features={name: torch.from_numpy(values) for name, values in prompts.history_features.items()},
    )


@dataclass(frozen=True, kw_only=True)
class PromptStep(StepInput):
    """The users of one update, whose completions are still to be drawn."""

    prompts: SequenceBatch
    """All of this rank's, on the host."""
    serials: Tensor
    """[B] int64: (step, user) as one number; never reused for other completions than those of the same weights."""

    def with_experience(self, supervision: dict[str, Jagged]) -> "PromptStep":
        """The same step with what is to be learnt. Shapes: a row per user in each entry."""
        full = replace(self.prompts, supervision=supervision)
        parts = split_users(full, len(self.micro_batches))
        micro_batches = tuple(
            replace(micro, batch=part.to(self.merged_device))
            for micro, part in zip(self.micro_batches, parts, strict=True)
        )
        return replace(self, micro_batches=micro_batches)

    @property
    def merged_device(self) -> torch.device:
        return self.micro_batches[0].batch.user_ids.device


class PromptFeed(Feed):
    """Steps of prompts; every user of an epoch comes once, in the same steps at every world size."""

    model: Generator

    def _prepare(self, batch: SequenceBatch, step: int) -> PromptStep:
        context = StepContext(
            step=step, seed=self.seed, rank=self.process.rank, world_size=self.process.world_size
        )
        prompts = prompt_batch(batch)
        asked = [
            (part, self.model.prompt_ids(part), part.num_users)
            for part in split_users(prompts, self.micro_batches)
        ]
        joined = join_parts(
            self.model.all_tables(), asked, prompts, context, self.item_features, self.process.device
        )
        serials = prompts.user_ids + step * self.stream.manifest.num_users
        return PromptStep(**vars(joined), prompts=prompts, serials=serials)
