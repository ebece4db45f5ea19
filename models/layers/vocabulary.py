"""The tokens of a text, as vectors that go into a decoder and as what comes out of it."""

import torch.nn.functional as F
from torch import Tensor, nn


class Vocabulary(nn.Module):
    """One vector per token, for both ways (tied weights)."""

    def __init__(self, weight: Tensor):
        """Shapes: [V, D]."""
        super().__init__()
        self.weight = nn.Parameter(weight)

    @property
    def size(self) -> int:
        return self.weight.shape[0]

    def forward(self, values: Tensor, *, predict: bool = False) -> Tensor:
        """Vectors of tokens [...] -> [..., D]; or the log-odds of every token after states [n, D] -> [n, V] fp32.

        One call for both: ZeRO-3 gathers the weights of a module while it is called.
        """
        return F.linear(values, self.weight).float() if predict else F.embedding(values, self.weight)
