"""The budget clock: how many tokens a user brings and in which step of the epoch each user is served."""

import math

import numpy as np

from data_streams.configuration import DataConfig
from data_streams.manifest import Manifest


def training_tokens(train_end: np.ndarray, max_length: int) -> np.ndarray:
    """Training inputs of each user: all training events but the last, at most `max_length` of them.

    Shapes: train_end [U] -> [U] int64.
    """
    return np.clip(train_end.astype(np.int64) - 1, 0, max_length)


def step_of_users(tokens: np.ndarray, tokens_before: int, config: DataConfig) -> np.ndarray:
    """Step that serves each user of a stream, given in serving order and after `tokens_before` tokens.

    A stream takes users until its total reaches (step + 1) * tokens_per_step / num_streams, so a user belongs
    to the step its first token falls into. Rounding never adds up, no user is split, and the steps that a
    long user fills beyond its first take none.

    Shapes: tokens [U] -> [U] int64, non-decreasing.
    """
    first_token = tokens_before + np.cumsum(tokens) - tokens
    return first_token * config.num_streams // config.tokens_per_step


def tokens_per_epoch(manifest: Manifest, max_length: int, history_share: float = 1.0) -> int:
    """Training inputs of all users after the cut to `max_length`.

    The manifest counts all events; where histories hold only a share of them (exposures lie beside), the number
    is an estimate.
    """
    counts, longest = manifest.train_length_counts, max_length / history_share
    tokens = sum(users * min(max(length - 1, 0), longest) for length, users in counts.items())
    return math.ceil(tokens * history_share)


def steps_per_epoch(manifest: Manifest, config: DataConfig, history_share: float = 1.0) -> int:
    """Steps of one pass over all users, for schedules; streams of unequal length can take a few more."""
    return math.ceil(tokens_per_epoch(manifest, config.max_length, history_share) / config.tokens_per_step)
