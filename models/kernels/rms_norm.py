"""Root mean square norm. On a processor some rows at a time go through all of it, and are read and written once.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.linear import matmul_dtype

BLOCK_ELEMENTS = 2**18
"""Of each thread. A few such blocks of fp32 stay in the caches of a core, and are long enough to hide what a call
costs."""
EPSILON = torch.finfo(torch.float32).eps
"""That of nn.RMSNorm in fp32."""


def rms_norm(rows: Tensor, weight: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + EPSILON) * weight, in the dtype of matrix products: those read it.

    Shapes: rows [..., D], weight [D] -> [..., D].
    """
    # torch.compile cannot trace the loop over blocks (torch 2.13), and needs none.
    if rows.device.type == "cpu" and rows.numel() and not torch.compiler.is_compiling():
        return _RmsNorm.apply(rows.reshape(-1, rows.shape[-1]), weight).view(rows.shape)
    return F.rms_norm(rows.float(), weight.shape, weight.float(), EPSILON).to(matmul_dtype(rows))


class _RmsNorm(torch.autograd.Function):
    """With u = x s, s = 1 / sqrt(mean(x^2) + EPSILON): dx = s (g w - u mean(g w u)), dw = sum g u."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        normed = torch.empty_like(rows, dtype=matmul_dtype(rows))
        for block, (unit,) in row_blocks(rows, 1):
            fill_unit(rows[block], unit)
            normed[block] = unit.mul_(weight)
        return normed

    @staticmethod
    def backward(ctx, gradient: Tensor):
        rows, weight = ctx.saved_tensors
        to_rows, to_weight = torch.empty_like(rows), torch.zeros_like(weight)
        for block, (unit, own, work) in row_blocks(rows, 3):
            scale = fill_unit(rows[block], unit)
            own.copy_(gradient[block])
            to_weight += torch.mul(own, unit, out=work).sum(0)
            own.mul_(weight)
            share = torch.linalg.vecdot(own, unit)[:, None] / rows.shape[1]
            to_rows[block] = own.sub_(unit.mul_(share)).mul_(scale)
        return to_rows, to_weight


def row_blocks(rows: Tensor, num_buffers: int) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, with buffers of that size, the same memory for all. Shapes: buffers [number, n, D] fp32."""
    size = min(max(torch.get_num_threads() * BLOCK_ELEMENTS // rows.shape[1], 1), len(rows))
    buffers = rows.new_empty(num_buffers, size, rows.shape[1], dtype=torch.float32)
    for first in range(0, len(rows), size):
        block = slice(first, first + size)
        yield block, buffers[:, : len(rows[block])]


def fill_unit(rows: Tensor, unit: Tensor) -> Tensor:
    """Fill in the rows scaled to a mean square of 1; returns the scale. Shapes: [n, D] each -> [n, 1]."""
    unit.copy_(rows)
    scale = torch.linalg.vector_norm(unit, dim=1, keepdim=True).square_()
    scale = scale.div_(rows.shape[1]).add_(EPSILON).rsqrt_()
    unit.mul_(scale)
    return scale
