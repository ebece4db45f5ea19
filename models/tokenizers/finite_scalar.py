"""Finite scalar quantisation: an autoencoder whose latent numbers are rounded to a few values each.

Source: Mentzer et al., Finite Scalar Quantization (2023). There are no codebooks to learn or to collapse: a level
is a group of numbers, its code their combination of values. Deviation: values are evenly spread in -1..1 for odd
and even counts alike. Levels do not refine each other, so a prefix says less about an item than with residuals.
"""

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ConfigError
from models.tokenizers.autoencoder import Autoencoder, Quantiser, Training

_MARGIN = 1.001
"""So that the outermost values can be reached."""


class FiniteScalar(Autoencoder):
    """The latent holds the numbers of all levels side by side, each in -1..1."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Training):
        values: tuple[int, ...] = (8, 8, 4)
        """Values of each number in a level; their product is the level's number of codes."""
        levels: int = 3
        """Length of a path."""
        seed: int = 0
        """Seed of all random draws."""

        def __post_init__(self):
            super().__post_init__()
            if self.levels < 1 or not self.values or min(self.values) < 2:
                raise ConfigError(
                    "--levels must be at least 1 and all --values at least 2, got "
                    f"{self.levels} and {self.values}"
                )

        def build(self, *, dim: int) -> "FiniteScalar":
            return FiniteScalar(self, dim, self.levels * len(self.values))

    def quantiser(self) -> "Rounding":
        return Rounding(self)

    def bound(self, latents: Tensor) -> Tensor:
        return (torch.tanh(latents) * _MARGIN).clamp(-1, 1)

    def take_code_vectors(self, quantiser: Quantiser) -> list[np.ndarray]:
        """Zero outside the numbers of the level, so that the nearest code is found number by number."""
        grids = [np.linspace(-1, 1, count, dtype=np.float32) for count in self.config.values]
        combinations = np.stack(np.meshgrid(*grids, indexing="ij"), -1).reshape(prod(self.config.values), -1)
        width = combinations.shape[1]
        vectors = np.zeros((self.config.levels, len(combinations), self.config.levels * width), np.float32)
        for level in range(self.config.levels):
            vectors[level, :, level * width : (level + 1) * width] = combinations
        return list(vectors)


class Rounding(Quantiser):
    """The nearest value of each number, with the gradient of the unrounded one and no loss."""

    def __init__(self, tokenizer: FiniteScalar):
        super().__init__()
        self.bound = tokenizer.bound
        counts = torch.tensor(tokenizer.config.values * tokenizer.config.levels)
        self.half = (counts - 1) / 2

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        bounded = self.bound(latents)
        rounded = ((bounded + 1) * self.half).round() / self.half - 1
        return bounded + (rounded - bounded).detach(), torch.zeros(len(latents))
