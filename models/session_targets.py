"""Sessions as targets: the first items of a session that was worth having, predicted one after another.

Source: OneRec (arXiv 2502.18965): sessions of at least five videos that were really watched, for some time in all and
with some interaction. RECONSTRUCTED: a session ends with a pause; what is seen as watched and the least time are
options; a session is predicted from all that comes before it.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.layers.event_features import ACTION, PLAY_TIME
from models.predicted_events import PREDICTED

TIME = "timestamp_s"
SESSION = "session"
"""In `SequenceBatch.supervision`: the items of each session that is predicted, a row of values for each."""


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    """What a session is, and what makes it worth being predicted."""

    items: int = 1
    """Items that are predicted together; 1 is every next item by itself (point-wise)."""
    gap_s: float = 1800.0
    """Pause after which a new session begins."""
    watched_s: float = 0.0
    """Seconds of play from which on an item was really watched; a session needs as many as are predicted."""
    play_s: float = 0.0
    """Least seconds of play of a session in all."""
    actions: tuple[str, ...] = ()
    """Actions of which a session needs at least one; none asks for nothing."""

    def __post_init__(self) -> None:
        if self.items < 1 or min(self.gap_s, self.watched_s, self.play_s) < 0:
            raise ConfigError(
                "sessions need at least 1 item, and seconds of 0 or more, got "
                f"{self.items} items and {self.gap_s}, {self.watched_s} and {self.play_s} s"
            )
        if self.items == 1 and (self.watched_s or self.play_s or self.actions):
            raise ConfigError(
                "the filter of sessions needs sessions; set session.items to 2 or more, or leave watched-s, play-s "
                "and actions out"
            )

    @property
    def event_columns(self) -> tuple[str, ...]:
        if self.items == 1:
            return ()
        needs_play = self.watched_s > 0 or self.play_s > 0
        return (TIME, *(PLAY_TIME,) * needs_play, *(ACTION,) * bool(self.actions))


def with_sessions(
    batch: SequenceBatch, config: SessionConfig, *, action_codes: list[int], count: int | None
) -> SequenceBatch:
    """Predict the latest `count` sessions of each user that are worth it, or all of them. Host side."""
    user = batch.items.row_index().numpy()
    columns = {name: column.numpy() for name, column in batch.target_features.items()}
    pause = columns[TIME] - batch.features[TIME].numpy()
    places = batch.items.places().numpy()
    begins = (pause > config.gap_s) | (places == 0)
    session = np.cumsum(begins) - 1
    starts = np.flatnonzero(begins)
    worth = _is_worth(session, len(starts), columns, config, action_codes)
    # The session of the first event began before it: what its next items follow is part of the same session.
    worth &= pause[starts] > config.gap_s
    chosen = starts[worth]
    if count is not None:
        following = np.bincount(user[chosen], minlength=batch.num_users)
        rank = np.arange(len(chosen)) - (np.cumsum(following) - following)[user[chosen]]
        chosen = chosen[rank >= following[user[chosen]] - count]
    lengths = torch.from_numpy(np.bincount(user[chosen], minlength=batch.num_users))
    items = batch.targets[torch.from_numpy(chosen[:, None] + np.arange(config.items))]
    rows = {
        PREDICTED: Jagged.from_lengths(torch.from_numpy(places[chosen]), lengths),
        SESSION: Jagged.from_lengths(items, lengths),
    }
    return replace(batch, supervision={**batch.supervision, **rows})


def _is_worth(
    session: np.ndarray, count: int, columns: dict, config: SessionConfig, action_codes: list[int]
) -> np.ndarray:
    """Shapes: session [T] of each event -> [sessions] bool."""
    total = lambda weights: np.bincount(session, weights=weights, minlength=count)  # noqa: E731
    # What is not known is below zero, and would shorten the session.
    play_s = np.maximum(np.nan_to_num(columns[PLAY_TIME]), 0) if PLAY_TIME in config.event_columns else None
    long_enough = np.bincount(session, minlength=count) >= config.items
    if play_s is not None:
        long_enough &= total(play_s >= config.watched_s) >= config.items
        long_enough &= total(play_s) >= config.play_s
    if config.actions:
        long_enough &= total(np.isin(columns[ACTION], action_codes)) > 0
    return long_enough
