"""Softmax cross-entropy of one target per query against negatives that all queries share."""

import torch
from torch import Tensor

from models.kernels.cross_entropy import SMALLEST_SHARE, block_rows
from models.layers.linear import ALIGNMENT_ROWS, align_rows, matmul_dtype


def shared_negative_softmax(
    queries: Tensor,
    negatives: Tensor,
    positive: Tensor,
    targets: Tensor,
    negative_ids: Tensor,
    weights: Tensor,
) -> Tensor:
    """Sum over queries of -s+ + log(exp s+ + sum_j w_j exp(q . n_j)), over negatives j that are not the target.

    The target's score becomes one more column beside those of the negatives, log w_j a bias of the matrix product,
    and an excluded negative one cell that is overwritten: so a block of scores is written once and passed over once.
    Gradients are those of a sum, times one number.

    Shapes: queries [T, D], negatives [R, D], positive [T] fp32 scores, targets [T] and negative_ids [R] int64,
    weights [R] fp32 -> scalar fp32.
    """
    order = negative_ids.argsort()
    ids = negative_ids[order]
    first = torch.searchsorted(ids, ids)
    # A negative drawn several times is one column with several times the weight, so that a target meets one at most.
    repeats = torch.searchsorted(ids, ids, right=True) - first
    is_first = first == torch.arange(len(ids), device=ids.device)
    bias = torch.where(is_first, (weights[order] * repeats).log(), float("-inf"))
    return _SharedNegativeSoftmax.apply(queries, negatives[order], positive, _column_of(targets, ids), bias)


def reference_softmax(scores: Tensor, positive: Tensor, excluded: Tensor, weights: Tensor) -> Tensor:
    """The same from given scores with plain operators. Shapes: [T, R], [T], [T, R], [R] -> [T]."""
    corrected = (scores + weights.log()).masked_fill(excluded, float("-inf"))
    return torch.cat((positive[:, None], corrected), dim=1).logsumexp(1) - positive


def _column_of(targets: Tensor, ids: Tensor) -> Tensor:
    """Where each target stands first among sorted ids [R], R + 1 where it does not. Shapes: [T] -> [T]."""
    place = torch.searchsorted(ids, targets)
    found = ids[place.clamp(max=len(ids) - 1)] == targets
    return torch.where(found, place, len(ids) + 1)


class _SharedNegativeSoftmax(torch.autograd.Function):
    """Columns 0..R are the negatives, column R is the target, the others are shut out."""

    @staticmethod
    def forward(
        ctx, queries: Tensor, negatives: Tensor, positive: Tensor, excluded: Tensor, bias: Tensor
    ) -> Tensor:
        dtype = matmul_dtype(queries)
        rows, num_negatives = align_rows(queries.to(dtype)), len(negatives)
        # Two columns beside the negatives are needed; an aligned number of them keeps the product quick.
        width = (num_negatives + 1) // ALIGNMENT_ROWS * ALIGNMENT_ROWS + ALIGNMENT_ROWS
        columns = torch.nn.functional.pad(negatives, (0, 0, 0, width - num_negatives)).to(dtype)
        columns_first = columns.T.contiguous()
        shut = torch.nn.functional.pad(bias, (0, width - num_negatives), value=float("-inf")).to(dtype)
        total = positive.new_zeros(())
        to_queries = torch.empty(queries.shape, device=queries.device)
        to_columns = torch.zeros(columns.shape, device=queries.device)
        to_positive = torch.empty_like(positive)
        step = block_rows(queries, width)
        cells = torch.arange(step, device=queries.device) * width
        for start in range(0, len(queries), step):
            block, here = rows[start : start + step], slice(start, start + step)
            count = len(positive[here])
            scores = torch.addmm(shut, block, columns_first)
            scores[:count, num_negatives] = positive[here]
            # scatter_ would copy all scores first.
            scores.view(-1).index_fill_(0, cells[:count] + excluded[here], float("-inf"))
            shares = scores.softmax(-1)
            own = shares[:count, num_negatives].float()
            total -= own.clamp(min=SMALLEST_SHARE).log().sum()
            to_positive[here] = own - 1
            # Fp32 by CUDA's autocast, which would round them anew for each product.
            shares = shares.to(dtype)
            to_queries[here] = (shares @ columns)[:count]
            # Rows that only align the block are zero and add nothing.
            to_columns += shares.T @ block
        ctx.save_for_backward(to_queries, to_columns[:num_negatives], to_positive)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        to_queries, to_negatives, to_positive = ctx.saved_tensors
        return to_queries * gradient, to_negatives * gradient, to_positive * gradient, None, None
