"""How a user of the synthetic world behaves, page by page; many users are simulated side by side.

Each user has a random stream of its own, keyed by (seed, user): a history does not depend on its neighbours.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.special import expit, ndtri

from data_streams.world_catalogue import STYLE_DIM, Catalogue

LOOKS_PER_PAGE = 11
"""Draws from the exposure policy for a page; about 8 of them show something new."""
NUM_HOMES = 3
TASTE_SHARE, POPULAR_SHARE, RANDOM_SHARE = 0.65, 0.2, 0.15
"""Of the looks: items near the taste, popular items, random items."""
FOCUS_SHARE = 0.75
"""Of the looks near the taste, those in the focus cluster; the others lie in the home clusters."""
TASTE_SHARPNESS = 2.5
"""How closely looks near the taste follow the style taste."""

APPEAL_BIAS, APPEAL_STYLE, APPEAL_QUALITY, APPEAL_FOCUS, APPEAL_HOME = -3.0, 1.5, 0.7, 2.0, 1.0
"""Log-odds of a click on an item that is looked at."""
ATTENTION = 1.0 / (1.0 + 0.12 * np.arange(LOOKS_PER_PAGE))
"""Chance that a look is a serious one, by its place on the page."""
CART_BIAS, CART_APPEAL, PURCHASE_BIAS, PURCHASE_QUALITY = -1.2, 0.6, -0.3, 0.8

MOVE_ON = 0.35
"""After a page with a click in the focus cluster, the chance to turn to the cluster that follows it."""
FOLLOW_TEMPER = 0.85
"""The chance that this is the successor of the user's temper."""
BORED = 0.1
"""After a page without such a click, the chance to turn to a home cluster."""
SESSION_END = 0.06
TASTE_SPREAD = 0.2
"""How far the style taste of a user begins from a named style, in each dimension."""
TASTE_MEMORY = 0.9
"""Share of the style taste that lives on in the next session."""

FIRST_TIME_S = 1_700_000_000
DAY_S = 86_400
PAGES_PER_DRAW = 32
_LOOK_DRAWS = 7
_PAGE_DRAWS = 8 + STYLE_DIM + _LOOK_DRAWS * LOOKS_PER_PAGE

Moment = Literal["validation", "test", "end"]
"""Before the last click but one, before the last click, and after all clicks of a history."""
_MOMENTS = {"validation": 2, "test": 1, "end": 0}


@dataclass(frozen=True, kw_only=True)
class UserStates:
    """What B users want at one moment each, and what they have clicked by then."""

    focus: np.ndarray
    """[B] cluster the user is after."""
    homes: np.ndarray
    """[B, NUM_HOMES] clusters the user comes back to; one may occur twice."""
    taste: np.ndarray
    """[B, STYLE_DIM] style taste, of length 1."""
    clicked: np.ndarray
    """[B, M] items clicked so far, oldest first, -1 in empty places."""


@dataclass(frozen=True, kw_only=True)
class Histories:
    """All that happened to B users: a row per look that showed or brought something, in the order of time."""

    events: dict[str, np.ndarray]
    """[E] each: row (of the user), item, page, position, time_s, click_time_s, shown, clicked, carted,
    purchased, play_time_s."""
    moments: dict[str, UserStates] = field(default_factory=dict)
    """State of every user at each moment."""


def appeal(catalogue: Catalogue, states: UserStates, items: np.ndarray, noise: float) -> np.ndarray:
    """Log-odds that a serious look at each item becomes a click. Shapes: items [B, K] -> [B, K]."""
    cluster = catalogue.cluster[items]
    style = np.einsum("bkd,bd->bk", catalogue.style[items], states.taste)
    at_home = (cluster[:, :, None] == states.homes[:, None, :]).any(-1)
    # Added one after the other, since the worlds of reports are known to the last bit.
    odds = APPEAL_BIAS + APPEAL_STYLE / noise * style
    odds = odds + APPEAL_QUALITY / noise * catalogue.quality[items]
    odds = odds + APPEAL_FOCUS / noise * (cluster == states.focus[:, None])
    return odds + APPEAL_HOME / noise * at_home


def simulate(
    catalogue: Catalogue, user_ids: np.ndarray, seed: int, mean_clicks: float, noise: float
) -> Histories:
    """The histories of these users, each up to its own number of clicks."""
    streams = [np.random.Generator(np.random.Philox(key=[seed, int(user)])) for user in user_ids]
    crowd = _Crowd(catalogue, np.array([stream.random(16) for stream in streams]), mean_clicks, noise)
    while len(crowd.active):
        draws = np.array([streams[row].random((PAGES_PER_DRAW, _PAGE_DRAWS)) for row in crowd.active])
        places = crowd.active
        for page in range(PAGES_PER_DRAW):
            going_on = np.searchsorted(places, crowd.active)
            if len(going_on):
                crowd.visit_page(draws[going_on, page])
    return crowd.histories()


class _Crowd:
    """Users in the course of their histories; every array has a row per user."""

    def __init__(self, catalogue: Catalogue, draws: np.ndarray, mean_clicks: float, noise: float):
        self.catalogue, self.noise = catalogue, noise
        num_users, num_clusters = len(draws), len(catalogue.members)
        self.num_clicks_wanted = _history_lengths(draws[:, 0], mean_clicks)
        self.temper = (draws[:, 1] * catalogue.successors.shape[1]).astype(int)
        self.homes = (draws[:, 2 : 2 + NUM_HOMES] * num_clusters).astype(int)
        self.focus = self.homes[:, 0].copy()
        favourite = catalogue.archetypes[(draws[:, 12] * len(catalogue.archetypes)).astype(int)]
        self.taste = _unit(favourite + TASTE_SPREAD * ndtri(draws[:, 6 : 6 + STYLE_DIM]))
        self.time_s = FIRST_TIME_S + (draws[:, 13] * 30 * DAY_S).astype(np.int64)
        self.page = np.zeros(num_users, dtype=np.int64)
        self.num_clicks = np.zeros(num_users, dtype=np.int64)
        self.clicked = np.full((num_users, self.num_clicks_wanted.max()), -1)
        self.active = np.arange(num_users)
        self.popularity_upto = np.cumsum(catalogue.popularity)
        self.remembered = {name: (self.focus.copy(), self.taste.copy()) for name in _MOMENTS}
        self.log: list[dict[str, np.ndarray]] = []

    def visit_page(self, draws: np.ndarray) -> None:
        """One page of every active user: looks, clicks, what is logged, and what is wanted next."""
        rows = self.active
        state = self._state(rows)
        look = draws[:, 8 + STYLE_DIM :].reshape(len(rows), _LOOK_DRAWS, LOOKS_PER_PAGE)
        items = self._look_at(state, look[:, 0], look[:, 1], look[:, 2])
        log_odds = appeal(self.catalogue, state, items, self.noise)
        serious = look[:, 3] < expit(log_odds) * ATTENTION
        known = (state.clicked[:, None, :] == items[:, :, None]).any(-1)
        same = (items[:, :, None] == items[:, None, :]) & np.tri(LOOKS_PER_PAGE, k=-1, dtype=bool)
        clicks = serious & ~known & ~(same & (serious & ~known)[:, None, :]).any(-1)
        remaining = self.num_clicks_wanted[rows] - self.num_clicks[rows]
        upto = np.cumsum(clicks, axis=1)
        over = upto - clicks >= remaining[:, None]
        clicks &= ~over
        shown = ~known & ~same.any(-1) & ~over
        self._record(rows, items, clicks, shown, same, log_odds, look)
        self._remember(rows, clicks)
        found = (clicks & (self.catalogue.cluster[items] == state.focus[:, None])).any(1)
        self._turn(rows, found, draws[:, : 8 + STYLE_DIM])
        self._finish(rows)

    def histories(self) -> Histories:
        events = {name: np.concatenate([page[name] for page in self.log]) for name in self.log[0]}
        order = np.lexsort((events["look"], events["page"], events["row"]))
        del events["look"]
        moments = {}
        for name, clicks_left in _MOMENTS.items():
            focus, taste = self.remembered[name]
            past = np.arange(self.clicked.shape[1]) < (self.num_clicks_wanted - clicks_left)[:, None]
            clicked = np.where(past, self.clicked, -1)
            moments[name] = UserStates(focus=focus, homes=self.homes, taste=taste, clicked=clicked)
        return Histories(events={name: column[order] for name, column in events.items()}, moments=moments)

    def _state(self, rows: np.ndarray) -> UserStates:
        return UserStates(
            focus=self.focus[rows], homes=self.homes[rows], taste=self.taste[rows], clicked=self.clicked[rows]
        )

    def _look_at(
        self, state: UserStates, kind: np.ndarray, where: np.ndarray, which: np.ndarray
    ) -> np.ndarray:
        """Items from the exposure policy. Shapes: [B, LOOKS_PER_PAGE] uniform draws -> items."""
        catalogue, rows = self.catalogue, np.arange(len(kind))[:, None]
        members = catalogue.members[np.column_stack([state.focus, state.homes])]
        desire = np.exp(TASTE_SHARPNESS * np.einsum("bcmd,bd->bcm", catalogue.style[members], state.taste))
        upto = np.cumsum(desire * (members >= 0), axis=-1)
        home = 1 + ((where - FOCUS_SHARE) / (1 - FOCUS_SHARE) * NUM_HOMES).astype(int)
        chosen = np.where(where < FOCUS_SHARE, 0, np.minimum(home, NUM_HOMES))
        place = (upto[rows, chosen] < (which * upto[rows, chosen, -1])[:, :, None]).sum(-1)
        near = members[rows, chosen, place]
        num_items = len(catalogue.cluster)
        popular = np.minimum(np.searchsorted(self.popularity_upto, which), num_items - 1)
        anything = (which * num_items).astype(int)
        return np.where(
            kind < TASTE_SHARE, near, np.where(kind < TASTE_SHARE + POPULAR_SHARE, popular, anything)
        )

    def _record(
        self,
        rows: np.ndarray,
        items: np.ndarray,
        clicks: np.ndarray,
        shown: np.ndarray,
        same: np.ndarray,
        log_odds: np.ndarray,
        look: np.ndarray,
    ) -> None:
        """Log what was shown or clicked; a click at the second look keeps the place of the first."""
        first = np.where(same.any(-1), same.argmax(-1), np.arange(LOOKS_PER_PAGE))
        position = np.take_along_axis(np.cumsum(shown, axis=1) - 1, first, axis=1)
        carted = clicks & (look[:, 4] < expit(CART_BIAS + CART_APPEAL * log_odds))
        quality = self.catalogue.quality[items]
        purchased = carted & (look[:, 5] < expit(PURCHASE_BIAS + PURCHASE_QUALITY * quality))
        watched = expit(log_odds + 2.0 + ndtri(np.clip(look[:, 6], 1e-9, 1 - 1e-9)))
        happened = clicks | shown
        row, place = np.nonzero(happened)
        self.log.append(
            {
                "row": rows[row],
                "look": place,
                "item": items[happened],
                "page": self.page[rows[row]],
                "position": position[happened],
                "time_s": self.time_s[rows[row]],
                "click_time_s": self.time_s[rows[row]] + 2 + 3 * place,
                "shown": shown[happened],
                "clicked": clicks[happened],
                "carted": carted[happened],
                "purchased": purchased[happened],
                "play_time_s": (watched * self.catalogue.duration_s[items])[happened].astype(np.float32),
            }
        )
        clicked_row, _ = np.nonzero(clicks)
        slot = (self.num_clicks[rows][:, None] + np.cumsum(clicks, axis=1) - 1)[clicks]
        self.clicked[rows[clicked_row], slot] = items[clicks]

    def _remember(self, rows: np.ndarray, clicks: np.ndarray) -> None:
        """Keep the state under which the last click and the last but one were made."""
        before = self.num_clicks[rows]
        self.num_clicks[rows] = before + clicks.sum(1)
        for name in ("validation", "test"):
            number = self.num_clicks_wanted[rows] - _MOMENTS[name] + 1
            made = rows[(before < number) & (self.num_clicks[rows] >= number)]
            self._keep(name, made)

    def _keep(self, name: str, rows: np.ndarray) -> None:
        focus, taste = self.remembered[name]
        focus[rows], taste[rows] = self.focus[rows], self.taste[rows]

    def _turn(self, rows: np.ndarray, found: np.ndarray, draws: np.ndarray) -> None:
        """What is wanted next: a successor, a home cluster, or a new session with another taste."""
        temper, focus = self.temper[rows], self.focus[rows]
        own = draws[:, 0] < FOLLOW_TEMPER
        follower = self.catalogue.successors[focus, np.where(own, temper, (temper + 1) % 2)]
        home = self.homes[rows, (draws[:, 1] * NUM_HOMES).astype(int)]
        ended = draws[:, 2] < SESSION_END
        go_on, go_home = found & (draws[:, 3] < MOVE_ON), ended | (~found & (draws[:, 3] < BORED))
        self.focus[rows] = np.where(go_home, home, np.where(go_on, follower, focus))
        drift = (
            np.sqrt(1 - TASTE_MEMORY**2) / np.sqrt(STYLE_DIM) * ndtri(np.clip(draws[:, 8:], 1e-9, 1 - 1e-9))
        )
        drifted = _unit(TASTE_MEMORY * self.taste[rows] + drift)
        self.taste[rows] = np.where(ended[:, None], drifted, self.taste[rows])
        pause = np.where(ended, 3_600 - 1.5 * DAY_S * np.log1p(-draws[:, 4]), 60 + 120 * draws[:, 4])
        self.time_s[rows] += pause.astype(np.int64)
        self.page[rows] += 1

    def _finish(self, rows: np.ndarray) -> None:
        done = self.num_clicks[rows] >= self.num_clicks_wanted[rows]
        self._keep("end", rows[done])
        self.active = rows[~done]


def _history_lengths(draws: np.ndarray, mean_clicks: float) -> np.ndarray:
    """Numbers of clicks: at least 3, spread exponentially around a common part, at most 4 times the mean."""
    common = 3 + 0.4 * (mean_clicks - 3)
    lengths = common - 0.6 * (mean_clicks - 3) * np.log1p(-draws)
    return np.minimum(lengths, 4 * mean_clicks).astype(int)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
