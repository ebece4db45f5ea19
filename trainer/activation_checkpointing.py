"""Trading time for memory: activations inside a model's blocks are dropped and computed again in backward."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cluster.errors import ConfigError

BLOCKS = "blocks"


def recompute_blocks(model: nn.Module) -> None:
    """Keep only the inputs of every module in the lists that a model, or a part of it, calls `blocks`.

    Cost: one more forward pass of the blocks per step.
    Raises: ConfigError if there is no such list.
    """
    blocks = [
        block
        for owner in model.modules()
        if isinstance(getattr(owner, BLOCKS, None), nn.ModuleList)
        for block in getattr(owner, BLOCKS)
    ]
    if not blocks:
        raise ConfigError(
            f"train.activation-checkpointing needs a model with an nn.ModuleList called {BLOCKS}, and "
            f"{type(model).__name__} has none; leave the option out"
        )
    for block in blocks:
        # On the instance, so that names of parameters and the hooks of ZeRO-3 stay as they are.
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable, *arguments: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    # Stopping early would skip the hooks in which ZeRO-3 gives up gathered parameters.
    return checkpoint(partial(_marked, forward), *arguments, use_reentrant=False, early_stop=False, **options)


def _marked(forward: Callable, *arguments: Any, **options: Any) -> Any:
    output = forward(*arguments, **options)
    return _RecomputeHere.apply(output) if isinstance(output, Tensor) else _RecomputeHere.apply(*output)


class _RecomputeHere(torch.autograd.Function):
    """Nothing but a saved tensor, whose use makes the whole block be computed again before its backward begins.

    Otherwise the first tensor needed inside would do that, at a time when ZeRO-3 (DeepSpeed 0.19.8) has gathered the
    parameters of the module it belongs to: recomputing that module gives them up under its hands.
    """

    @staticmethod
    def forward(ctx, *outputs: Tensor):
        ctx.save_for_backward(outputs[0].new_empty(0))
        passed = tuple(output.view_as(output) for output in outputs)
        return passed if len(passed) > 1 else passed[0]

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        _ = ctx.saved_tensors
        return gradients
