"""How long a shown item was watched, against what this user gives items of its length.

Source: the duration-aware reward of OneRec-V2 (2025; industrial.md 4.3): items fall into buckets floor(log_b(duration +
eps)), q is the percentile of the play time among the user's own history in that bucket, and an explicit dislike counts
-1. RECONSTRUCTED: b = 2, eps = 1 s, and a bucket in which the user has no history gives no opinion, nor does a play
time or a duration that is not known. Only completions that the user was really shown have feedback; the others are left
open, so that a quantile over a batch is one over lucky hits, where the report trains on all logged exposures. The
user's own history is what the run reads of it: clicks alone, unless `--data.history-exposures` adds what was only
shown. Belongs to binary advantages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cluster.errors import ConfigError, DataError
from rl.rewards import RewardFunction, RewardOptions, RewardSetting
from rl.types import Group, Reward

PLAY_TIME, DURATION, DISLIKED = "play_time_s", "duration_s", "disliked"


class Duration(RewardFunction):
    """Shapes: [G] per group, in 0..1 or -1; completions without feedback are masked.

    Raises: DataError where events come without play times and durations.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardOptions):
        reads_positive_features: ClassVar[bool] = True
        base: float = 2.0
        """Each bucket of durations is so many times as long as the one before."""
        offset_s: float = 1.0
        """Added to a duration before its logarithm."""

        def __post_init__(self) -> None:
            if self.base <= 1 or self.offset_s <= 0:
                raise ConfigError(
                    f"duration needs a base above 1 and an offset above 0 s, got {self.base} and {self.offset_s}"
                )

        def build(self, setting: RewardSetting) -> "Duration":
            return Duration(self)

    def __init__(self, config: Config):
        self.config = config

    async def score(self, groups: Sequence[Group]) -> list[Reward]:
        return [self._score(group) for group in groups]

    def _score(self, group: Group) -> Reward:
        values, mask = self._of_positives(group)
        same = group.items[:, None] == group.positives
        shown = same.any(1) & group.legal
        if not len(group.positives):
            return Reward.of(np.zeros(group.size), shown)
        first = same.argmax(1)
        return Reward.of(np.where(shown, values[first], 0.0), shown & mask[first])

    def _of_positives(self, group: Group) -> tuple[np.ndarray, np.ndarray]:
        """Percentile or -1, and whether there is one, for each observed item. Shapes: twice [P]."""
        past, shown = (_columns(group, name) for name in ("history_features", "positive_features"))
        same = self.buckets(shown[DURATION])[:, None] == self.buckets(past[DURATION])
        same &= _is_known(shown)[:, None] & _is_known(past)
        below = (same & (past[PLAY_TIME] < shown[PLAY_TIME][:, None])).sum(1)
        equal = (same & (past[PLAY_TIME] == shown[PLAY_TIME][:, None])).sum(1)
        count = same.sum(1)
        percentile = (below + equal / 2) / np.maximum(count, 1)
        disliked = np.asarray(group.positive_features.get(DISLIKED, np.zeros(len(count)))) > 0
        return np.where(disliked, -1.0, percentile), disliked | (count > 0)

    def buckets(self, duration_s: np.ndarray) -> np.ndarray:
        """Shapes: [n] -> [n] int64."""
        seconds = np.maximum(duration_s, 0).astype(np.float64) + self.config.offset_s
        powers = np.log(seconds) / np.log(self.config.base)
        # The quotient of two logarithms may be a little below a whole number: for 1,000 and 10 it is.
        return np.floor(powers + 1e-9).astype(np.int64)


def _is_known(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Numbers that events lack are below zero. Shapes: -> [n] bool."""
    return (columns[PLAY_TIME] >= 0) & (columns[DURATION] >= 0)


def _columns(group: Group, part: str) -> dict[str, np.ndarray]:
    columns = getattr(group, part)
    missing = [name for name in (PLAY_TIME, DURATION) if name not in columns]
    if missing:
        raise DataError(
            f"the duration reward needs {PLAY_TIME} and {DURATION} of every event, and {part} of user row "
            f"{group.user_row} lack {', '.join(missing)}; name them in --data.columns and build from a source "
            "that has them"
        )
    return columns
