"""Positions of a user that are drawn anew in every step, each of which stands for its share of all."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ConfigError
from cluster.seeds import purpose_seed
from cluster.user_draws import uniform_of_events
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.recommender import StepContext

PLACES = "prm_places"
"""Supervision: the drawn positions, by their place in the user."""
CONTEXT = "prm_context"
"""Supervision: the places of the events that each drawn position may see, one position behind the other."""


def check_positions(positions: int | None) -> None:
    """Raises: ConfigError where nothing would be learnt at."""
    if positions is not None and positions < 1:
        raise ConfigError(f"model.positions must be at least 1, or None for all, got {positions}")


def draw_positions(batch: SequenceBatch, context: StepContext, positions: int | None) -> SequenceBatch:
    """Choose what is learnt at; by the seed, the step and the user alone. Host side only."""
    lengths = batch.items.lengths
    if positions is None:
        places = batch.items.with_values(batch.items.places())
    else:
        seed = purpose_seed(context.seed, "prm positions", context.step)
        users = np.repeat(batch.user_ids.numpy(), positions)
        numbers = np.tile(np.arange(positions), batch.num_users)
        of_user = lengths.repeat_interleave(positions)
        uniform = torch.from_numpy(uniform_of_events(seed, users, numbers))
        drawn = torch.minimum((uniform * of_user).long(), of_user - 1)
        places = Jagged.from_lengths(drawn, torch.full_like(lengths, positions))
    return replace(batch, supervision={**batch.supervision, PLACES: places})


def with_seen_places(batch: SequenceBatch) -> SequenceBatch:
    """With what `drawn_histories` reads: one number for each event that a drawn position sees. Host side only."""
    lengths, places = batch.items.lengths, batch.supervision[PLACES]
    seen = places.values + 1
    histories = Jagged.from_lengths(torch.zeros(int(seen.sum()), dtype=torch.int64), seen)
    per_user = torch.zeros_like(lengths).index_add_(0, places.row_index(), seen)
    context_places = Jagged.from_lengths(histories.places(), per_user)
    return replace(batch, supervision={**batch.supervision, CONTEXT: context_places})


def whole_histories(batch: SequenceBatch) -> Jagged:
    """How many events a prompt behind all of a user's knows, one for each user. Host side. Shapes: [B] in B rows."""
    one_each = torch.arange(batch.num_users + 1)
    return Jagged(values=batch.items.lengths, offsets=one_each, max_length=min(batch.num_users, 1))


def drawn_events(batch: SequenceBatch) -> Tensor:
    """Where the drawn positions stand among the events of the batch. Shapes: [S]."""
    places = batch.supervision[PLACES]
    return batch.items.offsets[places.row_index()] + places.values


def drawn_share(batch: SequenceBatch, positions: int | None) -> Tensor | float:
    """For how many positions each drawn one stands. Shapes: [S]."""
    if positions is None:
        return 1.0
    return batch.items.lengths[batch.supervision[PLACES].row_index()] / positions


def drawn_histories(batch: SequenceBatch) -> Jagged:
    """The events that each drawn position may see, as indices into the batch's. Shapes: S rows."""
    places, context = batch.supervision[PLACES], batch.supervision[CONTEXT]
    ends = (places.values + 1).cumsum(0)
    return Jagged(
        values=batch.items.offsets[context.row_index()] + context.values,
        offsets=torch.cat((ends.new_zeros(1), ends)),
        max_length=batch.items.max_length,
    )
