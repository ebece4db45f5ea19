"""What is known before each target, token by token, for models that encode it anew for each."""

from dataclasses import replace

import torch
from torch import Tensor

from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.predicted_events import PREDICTED

KNOWN, COUNTS = "known_tokens", "known_counts"
"""In `SequenceBatch.supervision`: for all targets of a user the places of tokens among those of the user, and how many
they are for each target."""


def with_known_tokens(batch: SequenceBatch, tokens: Jagged, since: Tensor, until: Tensor) -> SequenceBatch:
    """A target at position p knows the tokens of its user with since <= p < until. Host side.

    Shapes: a row of `tokens` per user; since and until [C].
    """
    predicted = batch.supervision[PREDICTED]
    user = predicted.row_index()
    sizes = tokens.lengths[user]
    target = torch.arange(len(user)).repeat_interleave(sizes)
    place = torch.arange(len(target)) - (sizes.cumsum(0) - sizes)[target]
    token = tokens.offsets[user[target]] + place
    position = predicted.values[target] + 1
    visible = (since[token] <= position) & (position < until[token])
    counts = torch.zeros_like(user).index_add_(0, target, visible.long())
    per_user = torch.zeros(batch.num_users, dtype=torch.int64).index_add_(0, user, counts)
    rows = {
        KNOWN: Jagged.from_lengths(place[visible], per_user),
        COUNTS: Jagged.from_lengths(counts, predicted.lengths),
    }
    return replace(batch, supervision={**batch.supervision, **rows})
