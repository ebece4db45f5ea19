"""What a run may do to the repeated blocks of a model: compile them, or recompute their activations in backward."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cluster.errors import ConfigError

BLOCKS = "blocks"


def compile_blocks(model: nn.Module) -> None:
    """Let torch.compile fuse what the blocks compute; on a processor this needs a C++ compiler.

    Cost: half a minute and more in the first steps.
    Raises: ConfigError if there are no blocks.
    """
    for block in _blocks(model, "train.compile"):
        # Jagged batches bring a new number of events at every step.
        block.forward = torch.compile(block.forward, dynamic=True)


def recompute_blocks(model: nn.Module) -> None:
    """Keep only the inputs of blocks in the forward pass, and compute what lies between again in the backward pass.

    Cost: one more forward pass of the blocks per step.
    Raises: ConfigError if there are no blocks.
    """
    for block in _blocks(model, "train.activation-checkpointing"):
        # On the instance, so that names of parameters and the hooks of ZeRO-3 stay as they are.
        block.forward = partial(_recomputed, block.forward)


def _blocks(model: nn.Module, option: str) -> list[nn.Module]:
    """All modules in the lists that a model, or a part of it, calls `blocks`."""
    blocks = [
        block
        for owner in model.modules()
        if isinstance(getattr(owner, BLOCKS, None), nn.ModuleList)
        for block in getattr(owner, BLOCKS)
    ]
    if not blocks:
        raise ConfigError(
            f"{option} needs a model with an nn.ModuleList called {BLOCKS}, and {type(model).__name__} has none; "
            "leave the option out"
        )
    return blocks


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
