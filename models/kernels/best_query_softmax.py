"""Softmax cross-entropy where a position has several queries and an item's score is its best product with them."""

import torch
from torch import Tensor

from models.kernels.cross_entropy import block_rows


def best_query_softmax(
    queries: Tensor,
    negatives: Tensor,
    positive: Tensor,
    targets: Tensor,
    negative_ids: Tensor,
    weights: Tensor,
) -> Tensor:
    """Sum over positions of -s+ + log(exp s+ + sum_j w_j exp(max_m q_m . n_j)), j not being the target.

    A gradient goes to the query with the largest product alone, the first of several. Scores are made and dropped
    block by block in the forward pass, so that no matrix of all T M R products ever exists; gradients are therefore
    those of a sum, times one number.

    Shapes: queries [T, M, D], negatives [R, D], positive [T] fp32 scores, targets [T] and negative_ids [R] int64,
    weights [R] fp32 -> scalar fp32.
    """
    return _BestQuerySoftmax.apply(queries, negatives, positive, targets, negative_ids, weights.log())


class _BestQuerySoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        queries: Tensor,
        negatives: Tensor,
        positive: Tensor,
        targets: Tensor,
        negative_ids: Tensor,
        bias: Tensor,
    ) -> Tensor:
        # Never bf16: products of queries that are alike would tie, and a tie teaches the first of them alone.
        rows, columns = queries.float(), negatives.float()
        total = positive.new_zeros(())
        to_queries = torch.empty(queries.shape, device=queries.device)
        to_negatives = torch.zeros(negatives.shape, device=queries.device)
        to_positive = torch.empty_like(positive)
        with torch.autocast(queries.device.type, enabled=False):
            step = block_rows(queries, queries.shape[1] * len(negatives))
            for start in range(0, len(queries), step):
                here = slice(start, start + step)
                products = rows[here] @ columns.T
                scores, best = products.max(1)
                scores = (scores + bias).masked_fill_(targets[here, None] == negative_ids, float("-inf"))
                normaliser = torch.cat((positive[here, None], scores), dim=1).logsumexp(1)
                total += (normaliser - positive[here]).sum()
                to_positive[here] = (positive[here] - normaliser).exp() - 1
                shares = (scores - normaliser[:, None]).exp_()
                slopes = torch.zeros_like(products).scatter_(1, best[:, None], shares[:, None])
                to_queries[here] = slopes @ columns
                to_negatives += slopes.flatten(0, 1).T @ rows[here].flatten(0, 1)
        ctx.save_for_backward(to_queries, to_negatives, to_positive)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        to_queries, to_negatives, to_positive = ctx.saved_tensors
        return to_queries * gradient, to_negatives * gradient, to_positive * gradient, *(None,) * 3
