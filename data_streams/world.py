"""A synthetic world in which the truth is known: who likes what, when, and why it was clicked.

Items lie in clusters and have a style. A user has a style taste that drifts from session to session, some
home clusters, and at each moment a focus cluster; having found something there, the user may turn to a
cluster that follows it. A page is a series of looks; each look falls on an item drawn from the exposure
policy (popular ones, ones near the taste, random ones), and becomes a click with a chance that is the
item's appeal times the attention at that place.

Looks of a page are independent given the user's state, a look at an item clicked before leads to nothing, and
a user's history ends with a number of clicks fixed in advance. So, given the state, the next click falls on
item i with a probability exactly proportional to exposure(i) * appeal(i) over the items not clicked yet;
`oracle_scores` is that.

The events of user u depend on (seed, u) and the catalogue alone, so any range of users can be made by itself.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
from scipy.special import expit

from cluster.errors import ConfigError
from data_streams import world_catalogue, world_history
from data_streams.world_catalogue import Catalogue
from data_streams.world_history import (
    FOCUS_SHARE,
    NUM_HOMES,
    POPULAR_SHARE,
    RANDOM_SHARE,
    TASTE_SHARE,
    TASTE_SHARPNESS,
    Histories,
    Moment,
    UserStates,
    appeal,
    simulate,
)

FINGERPRINT_USERS = 32


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """A synthetic world; equal options make the same one, event by event."""

    num_users: int = 6_000
    """Users of the world."""
    num_items: int = 1_500
    """Items of the world."""
    num_clusters: int = 40
    """Kinds of items."""
    mean_clicks: float = 40.0
    """Clicks of a user on average."""
    seed: int = 0
    """Seed of the catalogue and of every user."""
    noise: float = 1.0
    """Divides what taste, quality and clusters add to the log-odds of a click: clicks tell less above 1, more below."""

    def __post_init__(self) -> None:
        if not 3 <= self.num_clusters <= self.num_items:
            raise ConfigError(
                f"--num-clusters must be from 3 to the number of items, given {self.num_clusters} clusters "
                f"and {self.num_items} items"
            )
        if not self.noise > 0:
            raise ConfigError(f"--noise of the world must be above 0, given {self.noise:g}")
        if self.seed < 0:
            raise ConfigError(f"--seed of the world must be at least 0, given {self.seed}")
        if self.num_users < 1 or self.mean_clicks < 3 or self.mean_clicks > self.num_items / 8:
            raise ConfigError(
                "the world needs at least 1 user and --mean-clicks from 3 to an eighth of the items, given "
                f"{self.num_users} users, {self.mean_clicks:g} clicks and {self.num_items} items"
            )


class World:
    """Makes the histories of its users and scores any (user, item) truthfully; ids are raw ids, from 0."""

    def __init__(self, config: WorldConfig):
        self.config = config

    @staticmethod
    def from_source(description: dict[str, Any]) -> "World":
        """The world a data set was built from, by the `source` of its manifest.

        Raises: ConfigError when it was built from another source.
        """
        if description.get("name") != "world":
            raise ConfigError(
                f"only data built from the world knows its truth, given source {description.get('name')!r}"
            )
        # Shards that were built before an option existed lack it.
        known = {entry.name for entry in fields(WorldConfig)} & description.keys()
        return World(WorldConfig(**{name: description[name] for name in known}))

    @cached_property
    def catalogue(self) -> Catalogue:
        return Catalogue.draw(self.config.num_items, self.config.num_clusters, self.config.seed)

    def histories(self, user_ids: np.ndarray) -> Histories:
        """Pages, looks and clicks of these users, made anew from the seed."""
        config = self.config
        return simulate(self.catalogue, np.asarray(user_ids), config.seed, config.mean_clicks, config.noise)

    def states(self, user_ids: np.ndarray, moment: Moment) -> UserStates:
        """What these users want at a moment, and what they have clicked by then."""
        return self.histories(user_ids).moments[moment]

    def click_probability(self, states: UserStates, items: np.ndarray) -> np.ndarray:
        """How likely a look at each item becomes a click, at full attention; 0 for what was clicked before.

        Shapes: items [B, K], a negative item stands for an empty place; returns [B, K].
        """
        probability = expit(appeal(self.catalogue, states, np.maximum(items, 0), self.config.noise))
        first = self.config.num_items * np.arange(len(items))[:, None]
        clicked = np.isin(first + items, (first + states.clicked)[states.clicked >= 0])
        return np.where(clicked | (items < 0), 0.0, probability)

    def expected_positives(
        self, user_ids: np.ndarray, items: np.ndarray, moment: Moment = "end"
    ) -> np.ndarray:
        """Expected clicks if the user looks once at each recommended item; an item listed twice counts once.

        Shapes: items [B, K] -> [B].
        """
        return self._expected_positives(self.states(user_ids, moment), items)

    def normalised_utility(
        self, user_ids: np.ndarray, items: np.ndarray, moment: Moment = "end"
    ) -> np.ndarray:
        """Expected positives on a scale where a random list scores 0 and the best list of that length 1.

        Shapes: items [B, K] -> [B].
        """
        return self.utility(self.states(user_ids, moment), items)

    def utility(self, states: UserStates, items: np.ndarray) -> np.ndarray:
        """The same for states at hand. Shapes: items [B, K] -> [B]."""
        length = items.shape[1]
        everything = self.click_probability(states, self._all_items(len(states.focus)))
        best = np.sort(everything, axis=1)[:, -length:].sum(1)
        unclicked = self.config.num_items - (states.clicked >= 0).sum(1)
        random = length * everything.sum(1) / unclicked
        return (self._expected_positives(states, items) - random) / (best - random)

    def oracle_scores(
        self, user_ids: np.ndarray, moment: Literal["validation", "test"] = "test"
    ) -> np.ndarray:
        """Probability that the held-out click falls on each item, given the user's true state.

        Shapes: [B, num_items]; each row sums to 1 and is 0 on items clicked before.
        """
        states = self.states(user_ids, moment)
        everything = self._all_items(len(states.focus))
        weight = self.exposure_probability(states) * self.click_probability(states, everything)
        return weight / weight.sum(1, keepdims=True)

    def exposure_probability(self, states: UserStates) -> np.ndarray:
        """How likely one look of the logging policy falls on each item. Shapes: [B, num_items]."""
        catalogue, config = self.catalogue, self.config
        desire = np.exp(TASTE_SHARPNESS * states.taste @ catalogue.style.T)
        totals = np.zeros((len(desire), config.num_clusters))
        np.add.at(totals.T, catalogue.cluster, desire.T)
        rows = np.arange(len(desire))
        clusters = np.zeros_like(totals)
        clusters[rows, states.focus] = FOCUS_SHARE
        for place in range(NUM_HOMES):
            clusters[rows, states.homes[:, place]] += (1 - FOCUS_SHARE) / NUM_HOMES
        near = desire * (clusters / totals)[:, catalogue.cluster]
        return TASTE_SHARE * near + POPULAR_SHARE * catalogue.popularity + RANDOM_SHARE / config.num_items

    def _expected_positives(self, states: UserStates, items: np.ndarray) -> np.ndarray:
        first = (items[:, :, None] == items[:, None, :]).argmax(-1) == np.arange(items.shape[1])
        return (self.click_probability(states, items) * first).sum(1)

    def _all_items(self, num_users: int) -> np.ndarray:
        return np.broadcast_to(np.arange(self.config.num_items), (num_users, self.config.num_items))


def world_fingerprint(config: WorldConfig | None = None) -> str:
    """Changes with the options of a world, with any constant of its users' behaviour and with what its first users
    do; what a report names, so that worlds are not tuned after results are known.
    """
    world = World(config or WorldConfig())
    constants = {
        f"{module.__name__}.{name}": np.asarray(value).tolist()
        for module in (world_history, world_catalogue)
        for name, value in sorted(vars(module).items())
        if name.isupper() and isinstance(value, int | float | np.ndarray)
    }
    users = np.arange(min(FINGERPRINT_USERS, world.config.num_users))
    events = world.histories(users).events
    options = asdict(world.config)
    if options["noise"] == 1.0:
        del options["noise"]  # younger than the fingerprints of reports
    digest = hashlib.sha256(json.dumps([options, constants]).encode())
    for name in ("row", "item", "page", "shown", "clicked", "carted", "purchased"):
        digest.update(events[name].astype("<i8").tobytes())
    return digest.hexdigest()[:16]
