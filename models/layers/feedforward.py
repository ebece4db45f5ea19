"""The dense feed-forward part of a block; `models.layers.moe` has the one made of experts."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import ConfigError
from models.layers.linear import Linear


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """Options of a dense feed-forward part; those of experts are `MixtureConfig`."""

    hidden: int = 256
    """Size of the gated hidden layer."""

    def build(self, width: int, init_scale: float = 0.02) -> "FeedForward":
        return FeedForward(width, self.hidden, init_scale)


class FeedForward(nn.Module):
    """SwiGLU: contract(silu(a) * b) with [a, b] = expand(x), without biases.

    Source: Shazeer, GLU Variants Improve Transformer (2020).
    Raises: ConfigError for a hidden layer of no width.
    """

    def __init__(self, width: int, hidden: int, init_scale: float = 0.02):
        super().__init__()
        if hidden < 1:
            raise ConfigError(
                f"the hidden layer of a feed-forward part must be at least 1 wide, got {hidden}"
            )
        self.expand = Linear(width, 2 * hidden, bias=False)
        self.contract = Linear(hidden, width, bias=False)
        for layer in (self.expand, self.contract):
            nn.init.normal_(layer.weight, std=init_scale)

    def forward(self, hidden: Tensor) -> Tensor:
        """Shapes: [T, D] -> [T, D]."""
        return self.contract(swish_gate(self.expand(hidden)))


def swish_gate(expanded: Tensor) -> Tensor:
    """silu(a) * b. Shapes: [a, b] as [T, 2 H] -> [T, H]."""
    gate, value = expanded.chunk(2, dim=-1)
    return F.silu(gate) * value
