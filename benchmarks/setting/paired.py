"""Two ways compared user by user: the mean change, averaged over seeds, with its interval over users."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from cluster.errors import DataError
from trainer.metrics import resampled_means

RESAMPLES = 2_000
CHANGE_HEAD = ("from", "to", "metric", "seeds", "change", "95 %", "relative (95 %)")
"""Of a table with a row of `change_cells` for each pair and metric."""
NO_SHARE = float("nan")
"""Where nothing, or hardly anything, was found before."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Of a metric, absolute and as a share of what it was before, each with its 95 % interval."""

    mean: float
    interval: tuple[float, float]
    relative: float
    relative_interval: tuple[float, float]

    def excludes_loss(self, share: float) -> bool:
        """Whether a loss of this share of the metric, or more, lies below the interval."""
        return self.relative_interval[0] > -share

    def __str__(self) -> str:
        low, high = self.interval
        return f"{low:+.4f} to {high:+.4f}"

    def as_share(self) -> str:
        if np.isnan(self.relative):
            return ""
        low, high = self.relative_interval
        return f"{self.relative:+.1%} ({low:+.1%} to {high:+.1%})"


def paired_change(runs: Sequence[pl.DataFrame], starts: Sequence[pl.DataFrame], metric: str) -> Change:
    """From `starts` to `runs`, one frame of `grail evaluate --per-user` for each seed; one start may stand for all.

    Raises: DataError where they are not of the same users.
    """
    own, other = _by_user(runs, metric), _by_user(starts, metric)
    if not all(frame["user_row"].equals(runs[0]["user_row"]) for frame in (*runs, *starts)):
        raise DataError(
            "runs must be compared on the same users, and these are of others; evaluate both on one data set"
        )
    means = resampled_means(np.stack((own, other), axis=1), resamples=RESAMPLES)
    after, before = means.T
    is_share = bool((before > 0).all())
    return Change(
        mean=float(own.mean() - other.mean()),
        interval=_interval(after - before),
        relative=float(own.mean() / other.mean() - 1) if is_share else NO_SHARE,
        relative_interval=_interval(after / before - 1) if is_share else (NO_SHARE, NO_SHARE),
    )


def change_cells(before: object, after: object, metric: str, seeds: int, change: Change) -> list[str]:
    return [
        str(before),
        str(after),
        metric,
        str(seeds),
        f"{change.mean:+.4f}",
        str(change),
        change.as_share(),
    ]


def _by_user(frames: Sequence[pl.DataFrame], metric: str) -> np.ndarray:
    return np.mean([frame[metric].to_numpy() for frame in frames], axis=0)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
