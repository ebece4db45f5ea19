"""Rewards against the mean of their group, in units of its spread: the advantage of GRPO.

RECONSTRUCTED (industrial.md 1.4): std + 1e-6, groups with std < 1e-6 are skipped, advantages are clamped to +-5. The
standard deviation is that of the population.
"""

from dataclasses import dataclass

import numpy as np

from cluster.errors import ConfigError
from rl.advantages import SMALLEST_STD, AdvantageEstimator, finished, masked_moments
from rl.types import Advantages


class GroupRelative(AdvantageEstimator):
    """A_i = (r_i - mean) / (std + 1e-6)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        divide_by_std: bool = True
        """Divide by the group's spread; Dr. GRPO does not."""
        limit: float = 5.0
        """Advantages beyond it are cut."""

        def __post_init__(self) -> None:
            if self.limit <= 0:
                raise ConfigError(f"advantage.limit must be above 0, got {self.limit}")

        def build(self) -> "GroupRelative":
            return GroupRelative(self)

    def __init__(self, config: Config):
        self.config = config

    def estimate(self, values: np.ndarray, mask: np.ndarray) -> Advantages:
        mean, std = masked_moments(values, mask)
        scale = std + SMALLEST_STD if self.config.divide_by_std else 1.0
        limit = self.config.limit
        return finished(np.clip((values - mean) / scale, -limit, limit), mask, std[:, 0] < SMALLEST_STD)
