"""Stochastic length: long histories are replaced, most of the time, by a random part of their events.

Source: Zhai et al., Actions Speak Louder than Words (2024), section 3.2. RECONSTRUCTED: events are drawn with
weights that grow linearly from the oldest to the newest, where the paper weighs by a feature of their times.
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


def shorten_histories(
    batch: SequenceBatch, context: StepContext, *, alpha: float, max_length: int
) -> SequenceBatch:
    """Keep a user of n events whole if n <= N^(alpha/2) =: K, or with probability N^alpha / n^2; else K events.

    N is the maximum length. An event that is kept keeps the target that followed it. The draws depend on the seed,
    the step and the user alone, so they are the same at every number of workers. Host side only.
    """
    # A power that is a whole number may come out a little below it.
    kept_length = math.floor(max_length ** (alpha / 2) + 1e-9)
    lengths = batch.items.lengths.numpy()
    if not (lengths > kept_length).any():
        return batch
    seed = purpose_seed(context.seed, "stochastic length", context.step)
    users = batch.user_ids.numpy()
    whole_probability = np.minimum(max_length**alpha / np.maximum(lengths, 1).astype(np.float64) ** 2, 1.0)
    cut = (lengths > kept_length) & (
        uniform_of_events(seed, users, np.zeros_like(users)) >= whole_probability
    )
    kept = _choose_events(seed, users, lengths, np.where(cut, kept_length, lengths))
    index = torch.from_numpy(np.flatnonzero(kept))
    row = np.repeat(np.arange(len(users)), lengths)
    return replace(
        batch,
        items=Jagged.from_lengths(
            batch.items.values[index], torch.from_numpy(np.bincount(row[kept], minlength=len(users)))
        ),
        targets=batch.targets[index],
        features={name: column[index] for name, column in batch.features.items()},
        target_features={name: column[index] for name, column in batch.target_features.items()},
    )


def _choose_events(seed: int, users: np.ndarray, lengths: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Draw `wanted` events of each user without replacement, newer ones more often. Shapes: [U] -> [T] bool."""
    row = np.repeat(np.arange(len(users)), lengths)
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(row)) - starts[row]
    # The largest of u^(1/weight) are a draw without replacement (Efraimidis and Spirakis, 2006).
    keys = np.log(uniform_of_events(seed, users[row], place + 1)) / (place + 1)
    order = np.lexsort((-keys, row))
    rank = np.empty(len(row), dtype=np.int64)
    rank[order] = np.arange(len(row)) - starts[row[order]]
    return rank < wanted[row]
