"""Assigning points to the nearest centroids of which each takes only so many.

Shapes: N points, K centroids, T candidates kept for each point.
"""

import numpy as np

from models.tokenizers.clustering import nearest_few, squared_distances
from models.tokenizers.tokenizer import BLOCK_ROWS, Matrix

CANDIDATES = 12
"""Nearest centroids that are remembered for each point; more are looked up when all of them are full."""
_BLOCK_CELLS = 2**24


def assign_within_capacity(points: Matrix, centroids: np.ndarray, capacities: np.ndarray) -> np.ndarray:
    """The pairs of point and centroid, taken by growing distance where both have room; ties by point.

    Found without sorting all N * K pairs: points propose to their nearest centroid, which keeps the nearest of
    them and turns the others away for good. Both sides rank by the same distance, so this deferred acceptance ends
    in the same, only stable matching.

    Shapes: points [N, d] (read in blocks), centroids [K, d], capacities [K] with a sum of at least N -> [N] int32.
    Cost: 8 * T bytes per point, and one block of distances.
    """
    state = _Matching(points, centroids, capacities)
    waiting = np.arange(points.shape[0])
    while len(waiting):
        waiting = state.propose(waiting)
    return state.held


class _Matching:
    def __init__(self, points: Matrix, centroids: np.ndarray, capacities: np.ndarray):
        self.points, self.centroids, self.capacities = points, centroids, capacities
        num_points, width = points.shape[0], min(CANDIDATES, len(centroids))
        # A full centroid takes no point that is farther than its farthest one, (limit, limit_point).
        self.limit = np.where(capacities > 0, np.inf, -np.inf).astype(np.float32)
        self.limit_point = np.full(len(centroids), num_points)
        self.candidates = np.empty((num_points, width), dtype=np.int32)
        self.distances = np.empty((num_points, width), dtype=np.float32)
        self.held = np.full(num_points, -1, dtype=np.int32)
        self.held_distance = np.empty(num_points, dtype=np.float32)
        for start in range(0, num_points, BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            block = np.asarray(points[rows], dtype=np.float32)
            self.candidates[rows], self.distances[rows] = nearest_few(block, centroids, width)

    def propose(self, waiting: np.ndarray) -> np.ndarray:
        """One round: each waiting point goes to its nearest centroid with room; returns who waits then."""
        is_open = self._is_open(waiting[:, None], self.candidates[waiting], self.distances[waiting])
        choice = is_open.argmax(axis=1)
        has_choice = is_open.any(axis=1)
        going, choice = waiting[has_choice], choice[has_choice]
        self.held[going] = self.candidates[going, choice]
        self.held_distance[going] = self.distances[going, choice]
        stuck = waiting[~has_choice]
        turned_away = self._turn_away()
        if len(stuck):
            self._look_up(stuck)
        return np.concatenate([stuck, turned_away])

    def _is_open(self, points: np.ndarray, centroids: np.ndarray, distances: np.ndarray) -> np.ndarray:
        limit = self.limit[centroids]
        is_tie = (distances == limit) & (points < self.limit_point[centroids])
        return ((distances < limit) | is_tie) & np.isfinite(distances)

    def _turn_away(self) -> np.ndarray:
        """Free the farthest points of overfull centroids, and return them."""
        sizes = np.bincount(self.held[self.held >= 0], minlength=len(self.centroids))
        overfull = sizes > self.capacities
        if not overfull.any():
            return np.empty(0, dtype=np.int64)
        members = np.flatnonzero((self.held >= 0) & overfull[self.held])
        order = np.lexsort((members, self.held_distance[members], self.held[members]))
        members = members[order]
        ranks = rank_in_group(self.held[members])
        capacities = self.capacities[self.held[members]]
        farthest = members[ranks == capacities - 1]
        self.limit[self.held[farthest]] = self.held_distance[farthest]
        self.limit_point[self.held[farthest]] = farthest
        turned_away = members[ranks >= capacities]
        self.held[turned_away] = -1
        return turned_away

    def _look_up(self, rows: np.ndarray) -> None:
        """Remember the nearest of the centroids that are open to these points now."""
        width, step = self.candidates.shape[1], max(_BLOCK_CELLS // len(self.centroids), 1)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            distances = squared_distances(np.asarray(self.points[part], np.float32), self.centroids)
            every = np.arange(len(self.centroids))[None]
            distances[~self._is_open(part[:, None], every, distances)] = np.inf
            nearest = np.argpartition(distances, width - 1, axis=1)[:, :width]
            order = np.argsort(np.take_along_axis(distances, nearest, 1), axis=1, kind="stable")
            self.candidates[part] = np.take_along_axis(nearest, order, 1)
            self.distances[part] = np.take_along_axis(distances, self.candidates[part], 1)


def rank_in_group(groups: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each run of equal values. Shapes: [n] -> [n] int64."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))
