"""The policy as the learner trains it: from completions and advantages in a batch to the loss of the objective.

All completions of a user, and what the user really took, attend to one pass over the prompt.

Shapes: B users, G completions, P observed positives (the longest user's), L codes.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.generator import Generator
from models.recommender import LossSum, StepContext
from models.tables import Rows
from rl.drawing import Drawing, likelihood
from rl.objectives import PolicyInputs, PolicyObjective
from rl.prompts import POSITIVES
from rl.types import Advantages, Completions
from trainer.dense_module import DenseModule

PATHS, OLD, ADVANTAGES, COUNTS = "paths", "old_log_probs", "advantages", "counts"
REFERENCE, POSITIVE_PATHS = "reference_log_probs", "positive_paths"


def experience(
    prompts: SequenceBatch, completions: Completions, advantages: Advantages, item_codes: Tensor
) -> dict[str, Jagged]:
    """What a batch of prompts is to learn, a row per user. Shapes: item_codes [N, L]."""
    groups = torch.full((prompts.num_users,), completions.paths.shape[1], dtype=torch.int64)

    def rows(values: np.ndarray) -> Jagged:
        return Jagged.from_lengths(torch.from_numpy(values).flatten(0, 1), groups)

    positives = prompts.supervision[POSITIVES]
    values = advantages.values if advantages.values.ndim == 3 else advantages.values[..., None]
    return {
        PATHS: rows(completions.paths),
        OLD: rows(completions.log_probs),
        ADVANTAGES: rows(values),
        COUNTS: rows(advantages.mask),
        POSITIVE_PATHS: positives.with_values(item_codes[positives.values].long()),
    }


class PolicyModule(DenseModule):
    """A generator under an objective of alignment."""

    def __init__(
        self, model: Generator, precision: torch.dtype, *, objective: PolicyObjective, drawing: Drawing
    ):
        super().__init__(model, precision)
        self.objective, self.drawing = objective, drawing

    def loss(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        given, group = batch.supervision, self.drawing.group_size
        by_group = lambda name: given[name].values.unflatten(0, (batch.num_users, group))  # noqa: E731
        paths = by_group(PATHS)
        if self.objective.needs_positives:
            positives, exists = padded(given[POSITIVE_PATHS])
            paths = torch.cat((paths, positives), dim=1)
        logits = self.model.path_logits(rows, batch, paths)
        drawn, observed = (
            [of_level[:, part] for of_level in logits] for part in (slice(group), slice(group, None))
        )
        inputs = PolicyInputs(
            log_probs=self.drawing.of_logits(drawn, paths[:, :group]),
            old_log_probs=by_group(OLD),
            advantages=by_group(ADVANTAGES),
            mask=by_group(COUNTS),
            reference_log_probs=by_group(REFERENCE) if self.objective.needs_reference else None,
            positive_log_probs=likelihood(observed, positives) if self.objective.needs_positives else None,
            positive_mask=exists if self.objective.needs_positives else None,
        )
        loss = self.objective(inputs)
        return replace(loss, metrics={**loss.metrics, **_observed(inputs)})


def _observed(inputs: PolicyInputs) -> Mapping[str, Tensor]:
    """Sums over users, as metrics are; `log_prob_difference` is 0 but for rounding where completions are fresh."""
    new, old = inputs.log_probs.detach(), inputs.old_log_probs
    return {
        "log_prob_difference": (new - old).abs().flatten(1).amax(1).sum() if new.numel() else new.sum(),
        "advantage_size": inputs.advantages.abs().flatten(1).mean(1).sum() if new.numel() else new.sum(),
    }


def padded(rows: Jagged) -> tuple[Tensor, Tensor]:
    """Rows of unequal number side by side. Shapes: values [n, L] -> [B, P, L] with -1 where there is none, [B, P]."""
    result = rows.values.new_full((rows.num_rows, rows.max_length, rows.values.shape[-1]), -1)
    result[rows.row_index(), rows.places()] = rows.values
    return result, result[..., 0] >= 0
