"""Vectors of the codes of semantic IDs: few enough to be part of the dense model."""

from itertools import accumulate

import torch
from torch import Tensor, nn


class CodeEmbedding(nn.Module):
    """One vector per level and code."""

    def __init__(self, code_sizes: tuple[int, ...], width: int):
        super().__init__()
        self.vectors = nn.Embedding(sum(code_sizes), width)
        starts = [0, *accumulate(code_sizes)][:-1]
        self.register_buffer("starts", torch.tensor(starts), persistent=False)

    def forward(self, codes: Tensor, first_level: int = 0) -> Tensor:
        """Codes of consecutive levels in the last dimension, from `first_level` on. Shapes: [..., l] -> [..., l, D]."""
        return self.vectors(codes + self.starts[first_level : first_level + codes.shape[-1]])
