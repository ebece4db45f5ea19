"""The two products of SwiGLU experts, over rows that are grouped by expert.

On an accelerator they are grouped products. On a processor they are done expert by expert and some rows at a time, so
that what lies between the two products is read while it is still in the cache: passes over all of it, through fresh
memory, cost as much as half of the products.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.feedforward import swish_gate

BLOCK_ROWS = 512


def expert_products(rows: Tensor, expand: Tensor, contract: Tensor, ends: Tensor) -> Tensor:
    """Rows `ends[e - 1]` to `ends[e]` go through expert e, in the dtype of the rows.

    Shapes: rows [P, D], expand [E, D, 2 H], contract [E, H, D], ends [E] int32 -> [P, D].
    """
    if rows.device.type == "cpu":
        return _ByExpert.apply(rows, expand, contract, ends.tolist())
    return grouped_products(rows, expand, contract, ends)


def grouped_products(rows: Tensor, expand: Tensor, contract: Tensor, ends: Tensor) -> Tensor:
    """Shapes: as of `expert_products`."""
    # Autocast does not know grouped products.
    expanded = F.grouped_mm(rows, expand.to(rows.dtype), offs=ends)
    return F.grouped_mm(swish_gate(expanded), contract.to(rows.dtype), offs=ends)


class _ByExpert(torch.autograd.Function):
    """What is needed of one expert or block alone lies in the same memory for all of them: fresh memory is slow."""

    @staticmethod
    def forward(ctx, rows: Tensor, expand: Tensor, contract: Tensor, ends: Sequence[int]) -> Tensor:
        ctx.ends, ctx.weight_dtype, hidden = ends, expand.dtype, []
        expand, contract = expand.to(rows.dtype), contract.to(rows.dtype)
        outputs = torch.empty_like(rows)
        gated = rows.new_empty(min(BLOCK_ROWS, len(rows)), contract.shape[1])
        for expert, spans in _visited(ends):
            for span in spans:
                expanded = rows[span] @ expand[expert]
                gate, value = expanded.chunk(2, dim=-1)
                swished = F.silu(gate)
                own = torch.mul(swished, value, out=gated[: len(expanded)])
                torch.mm(own, contract[expert], out=outputs[span])
                hidden += [expanded, swished]
        # Not kept on ctx, where activation checkpointing could not let go of it.
        ctx.save_for_backward(rows, expand, contract, *hidden)
        return outputs

    @staticmethod
    def backward(ctx, gradient: Tensor):
        rows, expand, contract, *hidden = ctx.saved_tensors
        blocks = iter(zip(hidden[::2], hidden[1::2], strict=True))
        gradient, to_rows = gradient.contiguous(), torch.empty_like(rows)
        to_weights = [torch.empty_like(stack, dtype=ctx.weight_dtype) for stack in (expand, contract)]
        to_expand, to_contract = to_weights
        is_cast = to_expand.dtype != expand.dtype
        of_expert = [torch.empty_like(stack[0]) if is_cast else None for stack in (expand, contract)]
        sizes = [last - first for first, last in pairwise([0, *ctx.ends])]
        gated, to_expanded = (
            rows.new_empty(max(sizes), size) for size in (contract.shape[1], expand.shape[2])
        )
        scratch = rows.new_empty(min(BLOCK_ROWS, max(sizes)), contract.shape[1])
        for expert in [number for number, size in enumerate(sizes) if size == 0]:
            to_expand[expert], to_contract[expert] = 0, 0
        for expert, spans in _visited(ctx.ends):
            first, last = spans[0].start, spans[-1].stop
            for span in spans:
                own = slice(span.start - first, span.stop - first)
                to_gated = torch.mm(gradient[span], contract[expert].T, out=scratch[: span.stop - span.start])
                _gate_backward(*next(blocks), to_gated, gated[own], to_expanded[own])
                torch.mm(to_expanded[own], expand[expert].T, out=to_rows[span])
            inputs = (rows[first:last], gated[: last - first])
            gradients = (to_expanded[: last - first], gradient[first:last])
            for whole, one, left, right in zip(to_weights, of_expert, inputs, gradients, strict=True):
                if is_cast:
                    whole[expert] = torch.mm(left.T, right, out=one)
                else:
                    torch.mm(left.T, right, out=whole[expert])
        return to_rows, to_expand, to_contract, None


def _visited(ends: Sequence[int]) -> Iterator[tuple[int, list[slice]]]:
    """Experts that have rows, each with its rows in blocks."""
    for expert, (first, last) in enumerate(pairwise([0, *ends])):
        starts = range(first, last, BLOCK_ROWS)
        if starts:
            yield expert, [slice(start, min(start + BLOCK_ROWS, last)) for start in starts]


def _gate_backward(
    expanded: Tensor, swished: Tensor, gradient: Tensor, gated: Tensor, to_expanded: Tensor
) -> None:
    """Fills in silu(a) * b and what its gradient makes of [a, b]; `swished` is silu(a), `gradient` is overwritten.

    Shapes: expanded and to_expanded [n, 2 H], the others [n, H].
    """
    gate, value = expanded.chunk(2, dim=-1)
    to_gate, to_value = to_expanded.chunk(2, dim=-1)
    torch.mul(swished, value, out=gated)
    torch.mul(swished, gradient, out=to_value)
    torch.ops.aten.silu_backward.grad_input(gradient.mul_(value), gate, grad_input=to_gate)
