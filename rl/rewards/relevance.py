"""The relevance gate: 1 for an item near the user's latest ones, 0 for a far or an illegal one.

Source: G_i = 1[s_i > tau] of GenRec (JD.com, 2026; industrial.md 1.4). RECONSTRUCTED: s_i is 0 for an illegal path,
else the largest cosine (or the mean of the 5 largest) between the item's vector and the last 20 items of the history;
tau is the 20th percentile of that score over items that users really took next, computed once.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import ConfigError
from rl.item_vectors import UnitVectors, last_items, relevance
from rl.rewards import RewardFunction, RewardOptions, RewardSetting
from rl.types import Group, Reward
from trainer.baselines import read_training_events

_MOST_USERS = 20_000


class Relevance(RewardFunction):
    """Shapes: [G] of 0 and 1 per group."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RewardOptions):
        vectors: str | None = None
        """Matrix (.npy) with a vector for each item row; None takes the data set's own embeddings."""
        history: int = 20
        """Latest items of the user that an item is compared with."""
        nearest: int = 1
        """How many of the nearest of them count, by their mean: 1 is the maximum, 5 the other reading."""
        quantile: float = 0.2
        """tau lets all but this share of the items pass that users really took next."""
        threshold: float | None = None
        """tau itself; None computes it from the training events."""

        def __post_init__(self) -> None:
            if self.history < 1 or self.nearest < 1 or not 0 <= self.quantile < 1:
                raise ConfigError(
                    "the relevance gate needs history and nearest of at least 1 and a quantile in 0..1, got "
                    f"{self.history}, {self.nearest} and {self.quantile}"
                )

        def prepared(self, setting: RewardSetting) -> "Relevance.Config":
            if self.threshold is not None:
                return self
            return dataclasses.replace(self, threshold=find_threshold(self, setting.data_path))

        def build(self, setting: RewardSetting) -> "Relevance":
            return Relevance(self.prepared(setting), UnitVectors.load(setting.data_path, self.vectors))

        def to_log(self) -> dict[str, Any]:
            return {"relevance_threshold": self.threshold}

    def __init__(self, config: Config, vectors: UnitVectors):
        self.config, self.vectors = config, vectors

    async def score(self, groups: Sequence[Group]) -> list[Reward]:
        return [Reward.of(passed) for passed in self.passes(groups)]

    def passes(self, groups: Sequence[Group]) -> np.ndarray:
        """Shapes: [B, G] bool."""
        items = np.stack([group.items for group in groups])
        history = last_items([group.history for group in groups], self.config.history)
        scores = relevance(self.vectors, history, items, self.config.nearest)
        return (scores > self.config.threshold) & (items >= 0)


def find_threshold(config: Relevance.Config, data_path: str) -> float:
    """The quantile of relevance over the last training event of users, given what came before it."""
    events = read_training_events(data_path, least_users=_MOST_USERS)
    starts = np.flatnonzero(np.diff(events.users, prepend=-1))
    stops = np.append(starts[1:], len(events.users))
    long = np.flatnonzero(stops - starts >= 2)[:_MOST_USERS]
    if not len(long):
        raise ConfigError(
            f"the threshold of the relevance gate is read off users with two training events, and {data_path} "
            "has none; give --rewards.relevance.threshold, within hybrid --rewards.hybrid.relevance.threshold"
        )
    histories = [
        events.items[start : stop - 1] for start, stop in zip(starts[long], stops[long], strict=True)
    ]
    taken = events.items[stops[long] - 1][:, None]
    vectors = UnitVectors.load(data_path, config.vectors)
    scores = relevance(vectors, last_items(histories, config.history), taken, config.nearest)
    return float(np.quantile(scores, config.quantile))
