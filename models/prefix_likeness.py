"""How alike a user and a prefix of a semantic ID are: the cosine of two vectors, over a temperature.

A product of two vectors can be trained against thousands of prefixes at every position for less than attention to the
history needs for a hundred at a few. Not of the paper: see `models.path_reward`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.linear import Linear, without_autocast


class PrefixLikeness(nn.Module):
    """Users and prefixes as vectors whose product is their likeness."""

    def __init__(self, *, width: int, row_width: int | None, temperature: float):
        """Without a width of rows, no prefix has one."""
        super().__init__()
        self.temperature = temperature
        self.of_user = Linear(width, width, bias=False)
        self.of_row = None if row_width is None else Linear(row_width, width, bias=False)

    def users(self, states: Tensor) -> Tensor:
        """Carries the temperature. Shapes: states [S, D] after the last event -> [S, D] fp32."""
        return F.normalize(self.of_user(states).float(), dim=-1, eps=1e-6) / self.temperature

    def prefixes(self, known: Tensor, rows: Tensor | None) -> Tensor:
        """Shapes: what the encoder begins with [n, D], rows of the prefixes [n, W] -> [n, D] fp32."""
        vectors = known if rows is None else known + self.of_row(rows)
        return F.normalize(vectors.float(), dim=-1, eps=1e-6)


def likeness(user_vectors: Tensor, prefix_vectors: Tensor) -> Tensor:
    """In fp32 also where products are in bf16, which is exact to .06 only at this temperature.

    Shapes: [S, D], prefixes of each user [S, C, D] or of all [C, D] -> [S, C].
    """
    with without_autocast(user_vectors):
        if prefix_vectors.dim() == 2:
            return user_vectors @ prefix_vectors.T
        return torch.bmm(prefix_vectors, user_vectors[..., None])[..., 0]
