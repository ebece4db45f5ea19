"""The Token Merger of GenRec: the codes of an item of the history become one token."""

import torch
from torch import Tensor, nn

from models.layers.linear import Linear


class TokenMerger(nn.Module):
    """h = W [e(s_1); ...; e(s_L)] + b; only of the history, never of what is written (hence asymmetric).

    Source: GenRec (JD.com, 2026), arXiv 2604.14878. RECONSTRUCTED: it begins as the mean of the codes' vectors, with
    normal noise of 0.02.
    """

    def __init__(self, num_levels: int, width: int):
        super().__init__()
        self.num_levels, self.width = num_levels, width
        self.merge = Linear(num_levels * width, width)

    def initialise(self) -> None:
        """To be called behind whatever initialises all layers of a model."""
        with torch.no_grad():
            mean = torch.eye(self.width).repeat(1, self.num_levels) / self.num_levels
            self.merge.weight.copy_(mean + 0.02 * torch.randn_like(mean))
            self.merge.bias.zero_()

    def forward(self, codes: Tensor) -> Tensor:
        """Shapes: [T, L, D] -> [T, D]."""
        return self.merge(codes.flatten(1))
