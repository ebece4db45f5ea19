"""What the weights of layers begin with."""

from torch import nn


def initialise(module: nn.Module, scale: float) -> None:
    """Draw the weights of a linear layer or an embedding anew; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=scale)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
