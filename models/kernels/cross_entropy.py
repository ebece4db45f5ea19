"""Summed softmax cross-entropy of queries over explicit candidates, on one process."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.linear import ALIGNMENT_ROWS, align_rows, matmul_dtype

BLOCK_CELLS = {"cpu": 2**20, "cuda": 2**26}
"""Scores computed at a time: what stays in the caches of a processor, what keeps an accelerator busy."""

SMALLEST_SHARE = torch.finfo(torch.float32).tiny
"""A target's share may underflow; its loss is then 87 and its gradient as it should be."""


def candidate_cross_entropy(
    queries: Tensor, candidates: Tensor, targets: Tensor, num_candidates: int
) -> Tensor:
    """Sum over queries of -log softmax(queries candidates^T)[target].

    Scores are made, turned into gradients and dropped block by block in the forward pass, so that neither scores
    nor probabilities of all queries ever exist; written with plain operators, the passes over them took several
    times as long as the matrix products. Gradients are therefore those of a sum, times one number.

    Shapes: queries [T, D], candidates [num_candidates, D], targets [T] int64 -> scalar fp32.
    """
    return _CandidateCrossEntropy.apply(queries, candidates, targets)


def reference_cross_entropy(
    queries: Tensor, candidates: Tensor, targets: Tensor, num_candidates: int
) -> Tensor:
    """The same with plain operators."""
    return F.cross_entropy((queries @ candidates.T).float(), targets, reduction="sum")


class _CandidateCrossEntropy(torch.autograd.Function):
    """With p = softmax(s): d/dq_t = p_t C - c_target, d/dC = sum_t p_t^T q_t, less q_t in the target's row."""

    @staticmethod
    def forward(ctx, queries: Tensor, candidates: Tensor, targets: Tensor) -> Tensor:
        loss, to_queries, to_candidates = cross_entropy_with_gradients(queries, candidates, targets)
        ctx.save_for_backward(to_queries, to_candidates)
        return loss

    @staticmethod
    def backward(ctx, gradient: Tensor):
        to_queries, to_candidates = ctx.saved_tensors
        return to_queries * gradient, to_candidates * gradient, None


def cross_entropy_with_gradients(
    queries: Tensor, candidates: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, its gradient by the queries [T, D] and by the candidates [C, D], all fp32."""
    dtype = matmul_dtype(queries)
    rows, columns = align_rows(queries.to(dtype)), candidates.to(dtype)
    columns_first = columns.T.contiguous()
    total = queries.new_zeros((), dtype=torch.float32)
    to_queries = torch.empty(queries.shape, device=queries.device)
    to_candidates = torch.zeros(candidates.shape, device=queries.device)
    for start in range(0, len(targets), step := block_rows(queries, candidates.shape[0])):
        block, wanted = rows[start : start + step], targets[start : start + step, None]
        count = len(wanted)
        shares = (block @ columns_first).softmax(-1)
        total -= shares[:count].gather(1, wanted).float().clamp(min=SMALLEST_SHARE).log().sum()
        # Fp32 by CUDA's autocast, which would round them anew for each product.
        shares = shares.to(dtype)
        to_queries[start : start + step] = (shares @ columns)[:count]
        # Rows that only align the block are zero and add nothing.
        to_candidates += shares.T @ block
    to_queries -= candidates.index_select(0, targets)
    to_candidates.index_add_(0, targets, queries.float(), alpha=-1)
    return total, to_queries, to_candidates


def block_rows(queries: Tensor, num_candidates: int, block_cells: Mapping[str, int] = BLOCK_CELLS) -> int:
    """Queries scored at a time, for so many scores of a block by kind of device."""
    cells = block_cells.get(queries.device.type, block_cells["cuda"])
    return max(cells // max(num_candidates, 1) // ALIGNMENT_ROWS, 1) * ALIGNMENT_ROWS
