"""The training example of a ranker over a window of exposures: one row per user, with all its candidates.

The requests (pages) of a window are answered from what the user took before: before the window (the static sequence),
or in it (the real-time sequence). An exposed item is answered with an action if the same user did that on the same
page. The exposures that evaluate a model are not in its training data (`data_streams.held_out_windows`).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cluster.seeds import purpose_seed
from cluster.user_draws import uniform_of_events
from data_streams.batch import SequenceBatch, page_item_key, page_key
from data_streams.jagged import Jagged
from models.answered_actions import EXPOSURE
from models.recommender import StepContext

CANDIDATES, VISIBLE, ANSWERS, NUM_STATIC = "candidates", "visible", "answers", "num_static"


@dataclass(frozen=True, kw_only=True)
class Window:
    """What the network reads, in training and when serving. Shapes: B users, N taken items, K candidates."""

    context: Jagged
    """[N] int64 items that the user took, oldest first: the static sequence, then the real-time one."""
    num_static: Tensor
    """[B] int64, how many of them are static."""
    candidates: Jagged
    """[K] int64 items."""
    visible: Tensor
    """[K] int64, how many taken items each candidate may know."""

    @staticmethod
    def of_training(batch: SequenceBatch) -> "Window":
        parts = batch.supervision
        return Window(
            context=batch.items,
            num_static=parts[NUM_STATIC].values,
            candidates=parts[CANDIDATES],
            visible=parts[VISIBLE].values,
        )

    @staticmethod
    def of_request(batch: SequenceBatch, candidates: Tensor, *, is_static: bool) -> "Window":
        """One request after the history, which is static or real-time as a whole. Shapes: candidates [B, C]."""
        num_users, num_candidates = candidates.shape
        lengths = batch.items.lengths
        return Window(
            context=batch.items,
            num_static=lengths if is_static else torch.zeros_like(lengths),
            candidates=Jagged(
                values=candidates.flatten(),
                offsets=num_candidates * torch.arange(num_users + 1, device=candidates.device),
                max_length=num_candidates,
            ),
            visible=lengths.repeat_interleave(num_candidates, output_size=candidates.numel()),
        )


def exposure_windows(
    batch: SequenceBatch,
    context: StepContext,
    *,
    codes: tuple[str, ...],
    actions: tuple[str, ...],
    drawn: bool,
) -> SequenceBatch:
    """The batch with what was taken as its items, and the candidates of the window as supervision. Host side only.

    Users without a candidate are left out. `codes` are the names of the column `action`, and what is answered by the
    first of `actions` was taken. The window is all of the user's pages, or begins at a page drawn by seed, step and
    user.
    """
    events = _Events.of(batch, codes)
    is_taken = events.action == codes.index(actions[0])
    taken, num_before = _taken_before(events, is_taken)
    is_candidate = events.action == codes.index(EXPOSURE)
    num_static = np.zeros(batch.num_users, dtype=np.int64)
    if drawn:
        begin = _window_begins(events, is_candidate, batch, context)
        is_candidate &= events.request_s >= begin[events.user]
        num_static = _least_of_users(events.user[is_candidate], num_before[is_candidate], batch.num_users)
    shown, user = np.flatnonzero(is_candidate), events.user[is_candidate]
    taken = taken[_is_known(events.user[taken], user, num_before[shown], batch.num_users)]
    same = page_item_key(events.user, events.page, batch.items.values.numpy())
    answers = [np.isin(same[shown], same[events.action == codes.index(name)]) for name in actions]
    asked = np.bincount(user, minlength=batch.num_users) > 0
    candidates = _by_user(batch.items.values[torch.from_numpy(shown)], user, asked)
    return replace(
        batch,
        user_ids=batch.user_ids[torch.from_numpy(asked)],
        items=_by_user(batch.items.values[torch.from_numpy(taken)], events.user[taken], asked),
        targets=None,
        features={},
        target_features={},
        seen=None,
        pages=None,
        supervision={
            CANDIDATES: candidates,
            VISIBLE: candidates.with_values(torch.from_numpy(num_before[shown])),
            ANSWERS: candidates.with_values(torch.from_numpy(np.stack(answers, axis=-1))),
            NUM_STATIC: _by_user(torch.from_numpy(num_static[asked]), np.flatnonzero(asked), asked),
        },
    )


@dataclass(frozen=True, kw_only=True)
class _Events:
    """Columns of a batch, [T] each; times in seconds, never falling within a user."""

    user: np.ndarray
    action: np.ndarray
    page: np.ndarray
    time_s: np.ndarray
    request_s: np.ndarray
    """When the event's page begins."""

    @staticmethod
    def of(batch: SequenceBatch, codes: tuple[str, ...]) -> "_Events":
        user = batch.items.row_index().numpy()
        action, page, time_s = (batch.features[name].numpy() for name in ("action", "page_id", "timestamp_s"))
        key = page_key(user, page)
        # Pages may overlap: a page begins with the first of its events, wherever the others are.
        _, first, number = np.unique(key, return_index=True, return_inverse=True)
        return _Events(
            user=user,
            action=action,
            page=page,
            time_s=time_s,
            request_s=time_s[first][number],
        )

    def moments(self, times_s: np.ndarray) -> np.ndarray:
        """Numbers in the order of (user, time). Shapes: [T] -> [T] int64."""
        low, high = int(self.time_s.min(initial=0)), int(self.time_s.max(initial=0))
        return self.user * (high - low + 1) + (times_s - low)


def _taken_before(events: _Events, is_taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which events were taken, and how many of the user's were at a time before each event's page began.

    Shapes: [T] -> [taken], [T].
    """
    taken = np.flatnonzero(is_taken)
    before = np.searchsorted(events.moments(events.time_s)[taken], events.moments(events.request_s), "left")
    return taken, before - np.searchsorted(events.user[taken], events.user, "left")


def _window_begins(
    events: _Events, is_candidate: np.ndarray, batch: SequenceBatch, context: StepContext
) -> np.ndarray:
    """When the window of each user begins: with a request, each with the same chance. Shapes: [B] seconds."""
    requests = np.unique(events.moments(events.request_s)[is_candidate], return_index=True)[1]
    at = np.flatnonzero(is_candidate)[requests]
    counts = np.bincount(events.user[at], minlength=batch.num_users)
    users = batch.user_ids.numpy()
    seed = purpose_seed(context.seed, "exposure window", context.step)
    drawn = (uniform_of_events(seed, users, np.zeros_like(users)) * counts).astype(np.int64)
    begins, has = np.zeros(batch.num_users, dtype=np.int64), counts > 0
    begins[has] = events.request_s[at][(np.cumsum(counts) - counts + np.minimum(drawn, counts - 1))[has]]
    return begins


def _least_of_users(user: np.ndarray, numbers: np.ndarray, num_users: int) -> np.ndarray:
    """The smallest number of each user, 0 for those without. Shapes: [n], [n] -> [B] int64."""
    least = np.full(num_users, np.iinfo(np.int64).max)
    np.minimum.at(least, user, numbers)
    return np.where(np.bincount(user, minlength=num_users) > 0, least, 0)


def _is_known(
    taken_user: np.ndarray, shown_user: np.ndarray, num_before: np.ndarray, num_users: int
) -> np.ndarray:
    """Which taken events some candidate of the user may know; no other is looked at.

    Shapes: taken_user [n], shown_user and num_before [K] -> [n] bool.
    """
    known = np.zeros(num_users, dtype=np.int64)
    np.maximum.at(known, shown_user, num_before)
    place = np.arange(len(taken_user)) - np.searchsorted(taken_user, taken_user)
    return place < known[taken_user]


def _by_user(values: Tensor, user: np.ndarray, kept: np.ndarray) -> Jagged:
    """A row for each user that is kept; the others have no values. Shapes: [n], [n], [B] bool."""
    return Jagged.from_lengths(values, torch.from_numpy(np.bincount(user, minlength=len(kept))[kept]))
