"""What the synthetic world knows of the users and items of a data set that was built from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_streams.world import World
from data_streams.world_history import Moment

_USERS_AT_A_TIME = 512


@dataclass(frozen=True, kw_only=True)
class WorldTruth:
    """Speaks in rows of the data set, where the world speaks in raw ids. Shapes: N items, U users."""

    world: World
    user_ids: np.ndarray
    """Raw id of every user row."""
    item_ids: np.ndarray
    """[N] raw id of every item row."""
    moment: Moment
    """The state of the users that is asked about."""

    def oracle_scores(self, users: np.ndarray) -> np.ndarray:
        """Probability that each item is the held-out one. Shapes: user rows [B] -> [B, N] float32."""
        scores = self.world.oracle_scores(self.user_ids[users], self.moment)
        return scores[:, self.item_ids].astype(np.float32)

    def utilities(
        self, users: np.ndarray, lists: np.ndarray, cutoffs: Sequence[int]
    ) -> Mapping[int, np.ndarray]:
        """True utility of the first k of each list: expected positives, a random list 0, the best possible 1.

        Shapes: user rows [U], item rows [U, K], -1 for an empty place -> [U] for each cutoff.
        """
        found = {k: np.zeros(len(users)) for k in cutoffs}
        raw = np.where(lists >= 0, self.item_ids[np.maximum(lists, 0)], -1)
        for start in range(0, len(users), _USERS_AT_A_TIME):
            part = slice(start, start + _USERS_AT_A_TIME)
            states = self.world.states(self.user_ids[users[part]], self.moment)
            for k in cutoffs:
                found[k][part] = self.world.utility(states, raw[part, :k])
        return found
