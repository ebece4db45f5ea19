"""A small correction of a layer's output that is learnt while the layer itself stays as it is."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.linear import Linear


class Adapter(nn.Module):
    """x + W_up relu(W_down x), which begins as x alone.

    Source: Houlsby et al., Parameter-Efficient Transfer Learning for NLP (2019).
    """

    def __init__(self, width: int, bottleneck: int):
        super().__init__()
        self.down, self.up = Linear(width, bottleneck), Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Shapes: [..., D] -> [..., D]."""
        flat = rows.flatten(0, -2)
        return rows + self.up(F.relu(self.down(flat))).view(rows.shape)


def add_adapter(layer: nn.Module, width: int, bottleneck: int) -> None:
    """Let a layer pass its output through an adapter, a part of it; its other weights keep their names."""
    layer.adapter = Adapter(width, bottleneck)
    layer.register_forward_hook(_adapt)


def _adapt(layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return layer.adapter(output)


def freeze(module: nn.Module) -> None:
    """Let nothing of a module be learnt any more: its weights become buffers, which checkpoints keep and optimizers
    never see."""
    for owner in module.modules():
        for name, weights in list(owner.named_parameters(recurse=False)):
            delattr(owner, name)
            owner.register_buffer(name, weights.detach())
