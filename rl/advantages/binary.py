"""Advantages in {-1, 0, 1}, not normalised: the best of the batch, explicit dislikes, and the rest.

Source: OneRec-V2 (2025; industrial.md 4.3), for its duration-aware feedback: +1 above the batch quantile that lets the
top quarter pass, -1 for a dislike, which rewards write as a value below 0. OURS: where more than that share the
largest value, all of these get +1. With a fixed threshold it is also the advantage of a format reward, whose legal
completions get 1.
"""

from dataclasses import dataclass

import numpy as np

from cluster.errors import ConfigError
from rl.advantages import AdvantageEstimator, finished
from rl.types import Advantages


class Binary(AdvantageEstimator):
    """A_i = 1 if r_i > threshold, -1 if r_i < 0, else 0."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        top_share: float = 0.25
        """Share of the batch's rewarded completions that get +1."""
        threshold: float | None = None
        """Rewards above it get +1; None takes the batch quantile that lets `top_share` pass."""

        def __post_init__(self) -> None:
            if not 0 < self.top_share < 1 or (self.threshold is not None and self.threshold < 0):
                raise ConfigError(
                    "advantage.top-share must lie in 0..1 and threshold at or above 0 (below 0 is a dislike), got "
                    f"{self.top_share} and {self.threshold}"
                )

        def build(self) -> "Binary":
            return Binary(self)

    def __init__(self, config: Config):
        self.config = config

    def estimate(self, values: np.ndarray, mask: np.ndarray) -> Advantages:
        threshold = self.config.threshold
        if threshold is None:
            threshold = _threshold(values[mask & (values >= 0)], self.config.top_share)
        signs = np.where(values < 0, -1.0, (values > threshold).astype(np.float64))
        return finished(signs, mask, ~(mask & (signs != 0)).any(1))


def _threshold(wanted: np.ndarray, top_share: float) -> float:
    """The quantile or, where so many share the largest value that nothing lies above, the largest value below it."""
    if not len(wanted):
        return np.inf
    threshold, largest = np.quantile(wanted, 1 - top_share), wanted.max()
    below = wanted[wanted < largest]
    return below.max() if threshold >= largest and len(below) else threshold
