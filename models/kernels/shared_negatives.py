"""Summed losses over the scores of each query's target and of negatives that all queries share."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.kernels.cross_entropy import block_rows
from models.layers.linear import align_rows, matmul_dtype

BLOCK_CELLS = {"cpu": 2**18, "cuda": 2**26}
"""Scores computed at a time: what stays in the caches of a processor, what keeps an accelerator busy."""


class Slopes(NamedTuple):
    """The losses of t queries over R negatives, and their derivatives by the scores they were made of."""

    losses: Tensor
    """[t]"""
    by_positive: Tensor
    """[t], by the score of the target."""
    by_scores: Tensor
    """[t, R], by the scores of the negatives, but for `row_scale`."""
    row_scale: Tensor
    """[t], what row t of `by_scores` is still to be multiplied with."""


Formula = Callable[[Tensor, Tensor, Tensor], Slopes]
"""(scores [t, R] fp32, which may be overwritten; positive scores [t]; excluded [t, R] bool) -> losses."""


def shared_negative_loss(
    queries: Tensor,
    negatives: Tensor,
    positive: Tensor,
    targets: Tensor,
    negative_ids: Tensor,
    formula: Formula,
) -> Tensor:
    """Sum over queries of a loss over s+ and the scores q . n_j of negatives other than the query's target.

    Scores are made, turned into derivatives and dropped block by block in the forward pass, so that no matrix of
    all scores ever exists; written with plain operators, the passes over it took longer than its matrix products.
    Gradients are therefore those of a sum, times one number.

    Shapes: queries [T, D], negatives [R, D], positive [T] fp32 scores, targets [T] and negative_ids [R] int64
    -> scalar fp32.
    """
    return _SharedNegativeLoss.apply(queries, negatives, positive, targets, negative_ids, formula)


class _SharedNegativeLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        queries: Tensor,
        negatives: Tensor,
        positive: Tensor,
        targets: Tensor,
        negative_ids: Tensor,
        formula: Formula,
    ) -> Tensor:
        dtype = matmul_dtype(queries)
        rows, columns = align_rows(queries.to(dtype)), align_rows(negatives.to(dtype))
        total = positive.new_zeros(())
        to_queries = torch.empty(queries.shape, device=queries.device)
        to_positive = torch.empty_like(positive)
        to_negatives = torch.zeros(columns.shape, device=queries.device)
        # Beside the matrix products, whose type is chosen above, everything is fp32.
        with torch.autocast(queries.device.type, enabled=False):
            for start in range(0, len(queries), step := block_rows(queries, len(negatives), BLOCK_CELLS)):
                block, here = rows[start : start + step], slice(start, start + step)
                count = len(positive[here])
                scores = (block @ columns.T)[:count, : len(negatives)].float()
                excluded = targets[here, None] == negative_ids
                found = formula(scores, positive[here], excluded)
                total += found.losses.sum()
                to_positive[here] = found.by_positive
                slopes = _operand(found.by_scores, len(block), len(columns), dtype)
                to_queries[here] = (slopes @ columns)[:count] * found.row_scale[:, None]
                scaled = (queries[here] * found.row_scale[:, None]).to(dtype)
                to_negatives += slopes.T @ _operand(scaled, len(block), scaled.shape[1], dtype)
        ctx.save_for_backward(to_queries, to_negatives[: len(negatives)], to_positive)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        to_queries, to_negatives, to_positive = ctx.saved_tensors
        return to_queries * gradient, to_negatives * gradient, to_positive * gradient, *(None,) * 3


def _operand(values: Tensor, num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor:
    """The values in another type, with zeros behind them up to an aligned shape."""
    if values.shape == (num_rows, num_columns):
        return values.to(dtype)
    padded = values.new_zeros(num_rows, num_columns, dtype=dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded
