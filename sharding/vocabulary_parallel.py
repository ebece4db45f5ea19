"""Softmax cross-entropy over a vocabulary whose rows are spread over the ranks."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from models.kernels.cross_entropy import matmul_dtype
from sharding.collectives import gather_rows, own_rows

BLOCK_COLUMNS = 8192
"""Candidates scored at a time, so that memory does not grow with the catalogue."""


def vocabulary_parallel_cross_entropy(
    targets_per_rank: tuple[int, ...],
) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """A cross-entropy in which every rank scores the queries of all ranks against its own candidates.

    The returned function takes queries [T, D] of this rank, its candidates [C, D], target ids [T] and the id of
    the first candidate, and returns losses [T] of this rank's queries. A collective call.

    Cost: two all-gathers of queries and targets, all-reduces of three numbers per query, and one all-reduce of
    the queries' gradients.
    """

    def cross_entropy(queries: Tensor, candidates: Tensor, targets: Tensor, first_candidate: int) -> Tensor:
        return _ParallelCrossEntropy.apply(queries, candidates, targets, targets_per_rank, first_candidate)

    return cross_entropy


class _ParallelCrossEntropy(torch.autograd.Function):
    """loss_t = log sum_c exp(s_tc) - s_t,target; its gradient by s_tc is softmax(s_t)_c - [c = target of t]."""

    @staticmethod
    def forward(
        ctx,
        queries: Tensor,
        candidates: Tensor,
        targets: Tensor,
        counts: tuple[int, ...],
        first_candidate: int,
    ) -> Tensor:
        dtype = matmul_dtype(queries)
        every_query = gather_rows(queries, counts).to(dtype)
        columns = gather_rows(targets, counts) - first_candidate
        candidates = candidates.to(dtype)
        own = (columns >= 0) & (columns < candidates.shape[0])
        maximum = torch.full(columns.shape, float("-inf"), device=queries.device)
        total = torch.zeros_like(maximum)
        picked = torch.zeros_like(maximum)
        for start, block in _blocks(candidates):
            scores = (every_query @ block.T).float()
            higher = torch.maximum(maximum, scores.amax(1))
            total = total * (maximum - higher).exp() + (scores - higher[:, None]).exp().sum(1)
            maximum = higher
            here = own & (columns >= start) & (columns < start + block.shape[0])
            column = (columns - start).clamp(0, block.shape[0] - 1)
            picked += torch.where(here, scores.gather(1, column[:, None])[:, 0], 0.0)
        log_sum = _reduce_log_sum(maximum, total)
        dist.all_reduce(picked)
        ctx.save_for_backward(every_query, candidates, columns, log_sum)
        ctx.counts, ctx.dtypes = counts, (queries.dtype, dtype)
        return own_rows(log_sum - picked, counts, dist.get_rank())

    @staticmethod
    def backward(ctx, gradient: Tensor):
        every_query, candidates, columns, log_sum = ctx.saved_tensors
        query_dtype, dtype = ctx.dtypes
        weights = gather_rows(gradient.contiguous(), ctx.counts)[:, None]
        query_gradient = torch.zeros(every_query.shape, device=every_query.device)
        candidate_gradient = torch.empty(candidates.shape, device=candidates.device)
        for start, block in _blocks(candidates):
            share = ((every_query @ block.T).float() - log_sum[:, None]).exp_()
            here = (columns >= start) & (columns < start + block.shape[0])
            column = (columns - start).clamp(0, block.shape[0] - 1)
            share.scatter_add_(1, column[:, None], -here.float()[:, None])
            share = (share * weights).to(dtype)
            query_gradient += (share @ block).float()
            candidate_gradient[start : start + block.shape[0]] = (share.T @ every_query).float()
        dist.all_reduce(query_gradient)
        own = own_rows(query_gradient, ctx.counts, dist.get_rank()).to(query_dtype)
        return own, candidate_gradient, None, None, None


def _blocks(candidates: Tensor):
    for start in range(0, candidates.shape[0], BLOCK_COLUMNS):
        yield start, candidates[start : start + BLOCK_COLUMNS]


def _reduce_log_sum(maximum: Tensor, total: Tensor) -> Tensor:
    """log of the sum over all ranks of total * exp(maximum), without overflow."""
    overall = maximum.clone()
    dist.all_reduce(overall, op=dist.ReduceOp.MAX)
    total = total * (maximum - overall).exp()
    dist.all_reduce(total)
    return overall + total.log()
