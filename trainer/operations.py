"""Floating-point operations of a training step, counted from those that really run."""

from collections.abc import Callable, Sequence
from importlib import import_module
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cluster.process import Process
from models.kernels.triton import load_kernels
from trainer.learner import StepResult


def counted_step(take: Callable[[], StepResult], process: Process) -> tuple[StepResult, float | None]:
    """Take a step -> its result, and operations per supervised target, the mean over all ranks; a collective call.

    Two operations for each multiplication and addition of matrix products and attention, forward and backward, and
    none for anything else; None where a step has no targets.
    """
    _load_formulas(process.device)
    with FlopCounterMode(display=False, custom_mapping=_further_formulas()) as counter:
        result = take()
    total = torch.tensor([counter.get_total_flops()], dtype=torch.float64, device=process.device)
    if process.world_size > 1:
        dist.all_reduce(total)
    return result, total.item() / result.global_count if result.global_count else None


def _load_formulas(device: torch.device) -> None:
    """Of kernels that bring their own: a counter takes the formulas that are known when it is made."""
    load_kernels(device)
    if device.type == "cuda":
        import_module("torch.nn.attention.varlen")


def _further_formulas() -> dict[Any, Callable[..., int]]:
    """Of what torch 2.13 does not count by itself: attention on a processor, products of experts and recurrent layers
    on an accelerator. They are given shapes in place of tensors."""
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten._grouped_mm: _grouped_product,
        aten._cudnn_rnn: _recurrence,
        aten._cudnn_rnn_backward: _recurrence_backward,
    }


def _attention(queries: Any, keys: Any, values: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(queries, keys, values)


def _attention_backward(gradients: Any, queries: Any, keys: Any, values: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradients, queries, keys, values)


def _grouped_product(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """Groups cut the rows, the columns or what is summed over, unless both sides hold a matrix for each."""
    groups = left[0] if len(left) == len(right) == 3 else 1
    return 2 * groups * left[-2] * left[-1] * right[-1]


def _recurrence(inputs: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    """All matrices once for each cell of the padded sequences."""
    return 2 * inputs[0] * inputs[1] * sum(prod(shape) for shape in weights if len(shape) == 2)


def _recurrence_backward(inputs: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    return 2 * _recurrence(inputs, weights)
