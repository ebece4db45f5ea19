"""Floating-point operations of a training step, counted from those that really run."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cluster.process import Process
from trainer.learner import StepResult


def counted_step(take: Callable[[], StepResult], process: Process) -> tuple[StepResult, float | None]:
    """Take a step -> its result, and operations per supervised target, the mean over all ranks; a collective call.

    Two operations for each multiplication and addition of matrix products and attention, forward and backward, and
    none for anything else; None where a step has no targets.
    """
    with FlopCounterMode(display=False, custom_mapping=_on_processors()) as counter:
        result = take()
    total = torch.tensor([counter.get_total_flops()], dtype=torch.float64, device=process.device)
    if process.world_size > 1:
        dist.all_reduce(total)
    return result, total.item() / result.global_count if result.global_count else None


def _on_processors() -> dict[Any, Callable[..., int]]:
    """Attention on a processor, which torch 2.13 does not count by itself."""
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }


def _attention(queries: Any, keys: Any, values: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(queries, keys, values)


def _attention_backward(gradients: Any, queries: Any, keys: Any, values: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradients, queries, keys, values)
