"""How alike a user and a prefix of a semantic ID are: the cosine of two vectors, over a temperature.

A product of two vectors can be trained against thousands of prefixes at every position for less than attention to the
history needs for a hundred at a few. Not of the paper: see `models.path_reward`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels.sampled_softmax import shared_negative_softmax
from models.layers.linear import Linear


class PrefixLikeness(nn.Module):
    """Users and prefixes as vectors whose product is their likeness."""

    def __init__(self, width: int, row_width: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.of_user = Linear(width, width, bias=False)
        self.of_row = Linear(row_width, width, bias=False)

    def users(self, states: Tensor) -> Tensor:
        """Carries the temperature. Shapes: states [S, D] after the last event -> [S, D] fp32."""
        return F.normalize(self.of_user(states).float(), dim=-1, eps=1e-6) / self.temperature

    def prefixes(self, known: Tensor, own: Tensor | None) -> Tensor:
        """Shapes: what the encoder begins with [n, D], rows of their own [n, D of rows] -> [n, D] fp32."""
        vectors = known if own is None else known + self.of_row(own)
        return F.normalize(vectors.float(), dim=-1, eps=1e-6)


def likeness_loss(
    users: Tensor, positive: Tensor, negatives: Tensor, ids: Tensor, negative_ids: Tensor
) -> Tensor:
    """InfoNCE of each user's prefix among the negatives that are not this prefix, summed over users.

    Shapes: users [T, D], positive [T, D], negatives [R, D], ids [T] and negative_ids [R] of the prefixes -> scalar.
    """
    own = (users * positive).sum(-1)
    return shared_negative_softmax(users, negatives, own, ids, negative_ids, own.new_ones(len(negatives)))
