"""The tokens of a text, as vectors that go into a decoder and as what comes out of it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Vocabulary(nn.Module):
    """One vector per token, for both ways (tied weights)."""

    def __init__(self, weight: Tensor):
        """Shapes: [V, D]."""
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, values: Tensor, *, predict: bool = False) -> Tensor:
        """Vectors of tokens [...] -> [..., D]; or the log-odds of every token after states [n, D] -> [n, V] fp32.

        One call for both: ZeRO-3 gathers the weights of a module while it is called.
        """
        return F.linear(values, self.weight).float() if predict else F.embedding(values, self.weight)


def with_others(vectors: Tensor, numbers: Tensor, others: nn.Module, size: int) -> Tensor:
    """The vectors of tokens, and those of `size` others in the place of tokens whose number is not negative.

    Shapes: vectors [N, D], numbers [N] -> [N, D].
    """
    return torch.where((numbers < 0)[:, None], vectors, others(numbers.clamp(0, size - 1)))
