"""What multi-item prediction learns where: chosen on the host, ahead of the step, so that no step waits for sizes.

For a target at time t, events of the last `window_s` seconds are as good as not there: when the page with it was asked
for, their feedback had not come in. Events are in the order of time, so what is left is the beginning of the sequence.
"""

import math
from dataclasses import replace

import numpy as np
import torch

from cluster.seeds import purpose_seed
from cluster.user_draws import uniform_of_events
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.recommender import StepContext

TIME = "timestamp_s"
VISIBLE = "visible"
"""Feature [T]: how many events of the user are older than the anchor of what follows this event."""
WANTED = "wanted_condition"
"""Feature [T]: a condition that the item after this event meets; NO_CONDITION if it meets none."""
OFFERED = "item_conditions"
"""Feature [T, m]: all conditions that this event's item meets, filled up with -1."""
NO_CONDITION = -2

_ALL_TIME_S = 2.0**40
"""Longer windows hide no more."""


def slots_name(branch: int) -> str:
    """Supervision: the events, by their place in the user, whose follower a branch learns."""
    return f"slots_{branch}"


def targets_name(branch: int) -> str:
    """Supervision: the item that is to be predicted at each slot."""
    return f"targets_{branch}"


def multi_item_batch(
    batch: SequenceBatch, *, num_branches: int, window_s: float | None, same_target: bool
) -> SequenceBatch:
    """Say what each event may see and what each branch learns at which events.

    Branch k (from 0) learns the item k places after the next one. With `same_target` all branches learn the next item,
    branch k from a sequence that ends k events earlier, in which the window hides what it hides of the whole one.
    Targets without any event to see are left out.
    """
    lengths = batch.items.lengths.numpy()
    places = batch.items.places().numpy()
    visible = places + 1 if window_s is None else _older_events(batch, window_s)
    left = np.repeat(lengths, lengths) - places
    users = batch.items.row_index().numpy()
    supervision = {}
    for branch in range(num_branches):
        ahead, back = (0, branch) if same_target else (branch, 0)
        learnt = np.flatnonzero((np.minimum(visible, places + 1 - back) > 0) & (left > ahead))
        counts = torch.from_numpy(np.bincount(users[learnt], minlength=len(lengths)))
        slots = Jagged.from_lengths(torch.from_numpy(places[learnt]), counts)
        supervision[slots_name(branch)] = slots
        supervision[targets_name(branch)] = slots.with_values(batch.targets[torch.from_numpy(learnt + ahead)])
    return replace(
        batch,
        features={**batch.features, VISIBLE: torch.from_numpy(visible)},
        supervision={**batch.supervision, **supervision},
    )


def _older_events(batch: SequenceBatch, window_s: float) -> np.ndarray:
    """Events of the user with a time below (time of the target) - window. Shapes: [T]."""
    times, users = batch.features[TIME].numpy(), batch.items.row_index().numpy()
    if not len(times):
        return np.zeros(0, dtype=np.int64)
    # Times of all users in one rising sequence: each user's lie in a range of their own.
    first = times.min()
    window = math.floor(min(window_s, _ALL_TIME_S))
    limits = np.maximum(batch.target_features[TIME].numpy() - window - first, 0)
    span = max(int(times.max() - first), int(limits.max())) + 1
    before = np.searchsorted(users * span + (times - first), users * span + limits)
    return before - batch.items.offsets.numpy()[users]


def conditional_batch(batch: SequenceBatch, context: StepContext, table: np.ndarray) -> SequenceBatch:
    """Add the conditions of all items, and for each target one of its own, drawn by (seed, step, user, place).

    Shapes: table [N, m] conditions of each item, -1 for none.
    """
    own = table[batch.targets.numpy()]
    counts = (own >= 0).sum(1)
    seed = purpose_seed(context.seed, "conditions", context.step)
    users = batch.user_ids.numpy()[batch.items.row_index().numpy()]
    drawn = (uniform_of_events(seed, users, batch.items.places().numpy()) * counts).astype(np.int64)
    wanted = np.where(counts > 0, own[np.arange(len(own)), drawn], NO_CONDITION)
    batch = with_item_conditions(batch, table)
    return replace(batch, features={**batch.features, WANTED: torch.from_numpy(wanted.astype(np.int64))})


def with_item_conditions(batch: SequenceBatch, table: np.ndarray) -> SequenceBatch:
    """Add the conditions of the items of the history. Shapes: table [N, m]."""
    offered = torch.from_numpy(table[batch.items.values.numpy()].astype(np.int64))
    return replace(batch, features={**batch.features, OFFERED: offered})
