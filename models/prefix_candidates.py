"""Prefixes as a process reward model sees them: what it is asked about, and what it is told apart in training."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.kernels.sampled_softmax import shared_negative_softmax
from models.prefix_likeness import likeness


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Prefixes, before any user is known."""

    tokens: Tensor
    """[..., W] what attends to the history."""
    vectors: Tensor | None
    """[..., D] what is compared with users, where the score has a likeness."""

    def __getitem__(self, places: Any) -> "Candidates":
        return Candidates(
            tokens=self.tokens[places], vectors=None if self.vectors is None else self.vectors[places]
        )


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """What was taken at some positions and what stands against it, at one depth."""

    positive: Candidates
    """[T]"""
    negatives: Candidates
    """[N], for all positions."""
    ids: Tensor
    """[T] of the positive prefixes."""
    negative_ids: Tensor
    """[N]"""

    def at(self, places: Tensor, num_negatives: int) -> "Contrast":
        """Some of the positions against the first of the negatives. Shapes: places [S]."""
        return Contrast(
            positive=self.positive[places],
            negatives=self.negatives[:num_negatives],
            ids=self.ids[places],
            negative_ids=self.negative_ids[:num_negatives],
        )

    @property
    def same(self) -> Tensor:
        """Which negatives are the positive of a position. Shapes: [T, N]."""
        return self.ids[:, None] == self.negative_ids

    def fixed_likeness(self, user_vectors: Tensor) -> Tensor:
        """Likeness without a gradient, that of the positive first. Shapes: user_vectors [T, D] -> [T, 1 + N]."""
        with torch.no_grad():
            own = likeness(user_vectors, self.positive.vectors[:, None])
            return torch.cat((own, likeness(user_vectors, self.negatives.vectors)), dim=1)

    def likeness_loss(self, user_vectors: Tensor) -> Tensor:
        """InfoNCE of the likeness among negatives that are not the positive, summed. Shapes: user_vectors [T, D]."""
        own = likeness(user_vectors, self.positive.vectors[:, None])[:, 0]
        return shared_negative_softmax(
            user_vectors,
            self.negatives.vectors,
            own,
            self.ids,
            self.negative_ids,
            own.new_ones(len(self.negative_ids)),
        )
