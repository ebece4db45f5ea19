"""Softmax attention within the cells of one bucket: what kernels whose queries see different keys have in common.

What costs on a processor are passes over pairs of a query and a key, so there are few of them, and what is hidden is
told by numbers that are added: to fill masked scores in takes as long as all the rest, forward and backward.
"""

import torch
from torch import Tensor

from models.kernels.length_buckets import pair_dtype
from models.layers.linear import without_autocast

HIDDEN = torch.finfo(torch.float32).min
"""A score that leaves no weight; not -inf, since a query that sees nothing would give NaN."""


def hidden_bias(hidden: Tensor) -> Tensor:
    """`HIDDEN` where something is hidden and 0 elsewhere, to be added to scores. Shapes: bool -> the same, fp32."""
    return hidden.float().mul_(HIDDEN)


def attend_cells(
    queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k / sqrt(D) + bias + hidden) v, and the logarithm of the sum that the softmax divides by.

    With both, attention to some keys can be joined to that to others. What is hidden has a weight of exactly zero. A
    query that sees nothing has a logarithm below HIDDEN / 2, and the mean of the values.

    Shapes: queries [users, heads, Q, D], keys and values [users, heads, K, D], hidden (of `hidden_bias`) and bias
    broadcast to [users, heads, Q, K] -> [users, heads, Q, D] in the dtype of products, [users, heads, Q, 1] fp32.
    """
    dtype = pair_dtype(queries, keys.shape[2])
    with without_autocast(queries):
        return _SoftmaxCells.apply(*(part.to(dtype) for part in (queries, keys, values)), hidden, bias)


class _SoftmaxCells(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, bias: Tensor | None):
        ctx.set_materialize_grads(False)
        ctx.bias_shape = None if bias is None else bias.shape
        q, k, v = (part.flatten(0, 1) for part in (queries, keys, values))
        scores = torch.bmm(q, k.transpose(1, 2)).float().unflatten(0, queries.shape[:2])
        torch.add(hidden, scores, alpha=queries.shape[-1] ** -0.5, out=scores)
        if bias is not None:
            scores += bias
        weights = scores.softmax(-1)
        # The largest weight is 1 / sum of exp(score - largest score).
        log_sum = scores.amax(-1, keepdim=True).sub_(weights.amax(-1, keepdim=True).log_())
        ctx.save_for_backward(q, k, v, weights)
        attended = torch.bmm(weights.flatten(0, 1).to(v.dtype), v)
        return attended.view(queries.shape), log_sum

    @staticmethod
    def backward(ctx, gradient: Tensor, to_log_sum: Tensor | None):
        q, k, v, weights = ctx.saved_tensors
        shape, scale = weights.shape[:2], q.shape[-1] ** -0.5
        gradient = gradient.flatten(0, 1)
        to_values = torch.bmm(weights.flatten(0, 1).to(v.dtype).transpose(1, 2), gradient)
        to_weights = torch.bmm(gradient, v.transpose(1, 2)).float().unflatten(0, shape)
        to_scores = torch._softmax_backward_data(to_weights, weights, -1, torch.float32)
        if to_log_sum is not None:
            to_scores.addcmul_(weights, to_log_sum)
        to_bias = to_scores.sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[4] else None
        to_scores = to_scores.flatten(0, 1).to(q.dtype)
        to_queries = torch.bmm(to_scores, k).mul_(scale)
        to_keys = torch.bmm(to_scores.transpose(1, 2), q).mul_(scale)
        return *(part.unflatten(0, shape) for part in (to_queries, to_keys, to_values)), None, to_bias
