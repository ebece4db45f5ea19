"""Softmax cross-entropy of one target per query against negatives that all queries share."""

import torch
from torch import Tensor

from models.kernels.cross_entropy import matmul_dtype
from models.layers.linear import align_rows


def shared_negative_softmax(
    queries: Tensor, negatives: Tensor, positive: Tensor, excluded: Tensor, correction: float
) -> Tensor:
    """-s+ + log(exp s+ + sum_j exp(q . n_j + correction)), the sum over negatives that are not excluded.

    The score matrix is written once and turned into probabilities in place; written with plain operators, the
    passes over it took longer than its matrix products.

    Shapes: queries [T, D], negatives [R, D], positive [T] fp32 scores, excluded [T, R] bool -> [T] fp32.
    """
    return _SharedNegativeSoftmax.apply(queries, negatives, positive, excluded, correction)


def reference_shared_negative_softmax(
    queries: Tensor, negatives: Tensor, positive: Tensor, excluded: Tensor, correction: float
) -> Tensor:
    """The same with plain operators."""
    scores = (queries @ negatives.T).float() + correction
    scores = torch.cat((positive[:, None], scores.masked_fill(excluded, float("-inf"))), dim=1)
    return scores.logsumexp(1) - positive


class _SharedNegativeSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, queries: Tensor, negatives: Tensor, positive: Tensor, excluded: Tensor, correction: float
    ) -> Tensor:
        dtype = matmul_dtype(queries)
        q, n = align_rows(queries.to(dtype)), negatives.to(dtype)
        num_queries = queries.shape[0]
        scores = (q @ n.T)[:num_queries].float()
        scores.masked_fill_(excluded, float("-inf"))
        highest = torch.maximum(scores.amax(1) + correction, positive) if scores.numel() else positive
        exponentials = scores.sub_((highest - correction)[:, None]).exp_()
        own = (positive - highest).exp()
        total = exponentials.sum(1) + own
        ctx.save_for_backward(q, n, exponentials, own, total)
        return total.log() + highest - positive

    @staticmethod
    def backward(ctx, gradient: Tensor):
        q, n, exponentials, own, total = ctx.saved_tensors
        share = align_rows((exponentials * (gradient / total)[:, None]).to(q.dtype))
        to_queries = (share @ n)[: exponentials.shape[0]].float()
        return to_queries, (share.T @ q).float(), gradient * (own / total - 1), None, None
