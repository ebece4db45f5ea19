"""An advantage for each code from a process reward: how good the prefixes are from that code on.

Source: process supervision of DeepSeekMath (Shao et al. 2024): the advantage of a token is the sum of the normalised
rewards of its own and later steps. RECONSTRUCTED for items: a step is a code, and rewards are normalised over the group
at each depth, since a PRM's scores of different depths have no common scale. A reward of the whole completion is one of
the last depth.
"""

from dataclasses import dataclass

import numpy as np

from cluster.errors import ConfigError
from rl.advantages import SMALLEST_STD, AdvantageEstimator, finished, masked_moments
from rl.types import Advantages


class StepWise(AdvantageEstimator):
    """A_{i,t} = sum_{s >= t} discount^(s - t) (r_{i,s} - mean_s) / (std_s + 1e-6)."""

    of_codes = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        discount: float = 1.0
        """How much the reward of each later code counts for a code."""
        limit: float = 5.0
        """Advantages beyond it are cut."""

        def __post_init__(self) -> None:
            if not 0 <= self.discount <= 1 or self.limit <= 0:
                raise ConfigError(
                    f"advantage.discount must lie in 0..1 and limit above 0, got {self.discount} and {self.limit}"
                )

        def build(self) -> "StepWise":
            return StepWise(self)

    def __init__(self, config: Config):
        self.config = config

    def estimate(self, values: np.ndarray, mask: np.ndarray) -> Advantages:
        result = np.zeros_like(values)
        later, spread = np.zeros(mask.shape), np.zeros(len(mask))
        for depth in reversed(range(values.shape[-1])):
            mean, std = masked_moments(values[..., depth], mask)
            # A depth at which all are equal says nothing, and must not blow rounding errors up.
            scaled = np.where(std < SMALLEST_STD, 0.0, (values[..., depth] - mean) / (std + SMALLEST_STD))
            later = scaled + self.config.discount * later
            result[..., depth] = later
            spread = np.maximum(spread, std[:, 0])
        limit = self.config.limit
        return finished(np.clip(result, -limit, limit), mask, spread < SMALLEST_STD)
