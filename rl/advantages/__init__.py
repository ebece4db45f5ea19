"""Advantages: one file each, from the rewards of whole groups to how much better each completion is than expected."""

from abc import ABC, abstractmethod

import numpy as np

from cluster.errors import ConfigError
from rl.types import Advantages

SMALLEST_STD = 1e-6
"""Groups whose rewards differ less teach nothing and are skipped."""


class AdvantageEstimator(ABC):
    """A pure function of rewards; knows nothing of the policy."""

    of_codes: bool = False
    """Whether it wants a reward for every code, [B, G, L], and gives an advantage for each."""

    def __call__(self, values: np.ndarray, mask: np.ndarray) -> Advantages:
        """Shapes: values [B, G] or [B, G, L], mask [B, G] bool: completions that have a reward.

        Raises: ConfigError where the rewards are of another kind than the estimator takes.
        """
        self.check_rewards(of_codes=values.ndim == 3)
        cleaned = np.where(mask if values.ndim == 2 else mask[..., None], values, 0.0).astype(np.float64)
        return self.estimate(cleaned, mask)

    def check_rewards(self, *, of_codes: bool) -> None:
        """Raises: ConfigError where the rewards that are added up are of another kind than the estimator takes."""
        if of_codes != self.of_codes:
            wanted, given = ("one per code", "one per completion")[:: 1 if self.of_codes else -1]
            raise ConfigError(
                f"the advantage {type(self).__name__} takes rewards that are {wanted}, and the run's are {given}; "
                "step-wise advantages belong to a process reward, the others to rewards of whole completions"
            )

    @abstractmethod
    def estimate(self, values: np.ndarray, mask: np.ndarray) -> Advantages:
        """The same with 0 where there is no reward; float64."""


def masked_moments(values: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (of the population) over what counts. Shapes: [B, G] -> twice [B, 1]."""
    count = np.maximum(mask.sum(1, keepdims=True), 1)
    mean = (values * mask).sum(1, keepdims=True) / count
    variance = (np.square(values - mean) * mask).sum(1, keepdims=True) / count
    return mean, np.sqrt(variance)


def finished(values: np.ndarray, mask: np.ndarray, skipped: np.ndarray) -> Advantages:
    """With 0 where a group is skipped or a completion does not count.

    Completions of skipped groups go on to count: only they themselves have nothing to teach, and an objective may hold
    them to a reference.

    Shapes: values [B, G] or [B, G, L], mask [B, G], skipped [B].
    """
    teaches = mask & ~skipped[:, None]
    shown = teaches if values.ndim == 2 else teaches[..., None]
    return Advantages(values=np.where(shown, values, 0.0).astype(np.float32), mask=mask, skipped=skipped)
