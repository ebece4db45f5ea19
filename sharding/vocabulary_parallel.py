"""Softmax cross-entropy over a vocabulary whose rows are spread over the ranks.

What is fewer travels: with more targets in a step than candidates, every rank gathers the candidates and scores its
own queries; else it gathers the queries and scores all of them against its own candidates.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from models.kernels.cross_entropy import cross_entropy_with_gradients
from models.layers.linear import matmul_dtype
from models.recommender import CandidateCrossEntropy, StepContext
from sharding.collectives import gather_rows, own_rows

BLOCK_COLUMNS = 8192
"""Candidates scored at a time, so that memory does not grow with the catalogue."""


def vocabulary_parallel_cross_entropy(context: StepContext) -> CandidateCrossEntropy:
    """A cross-entropy for ranks that each hold their `own_range` of the candidates.

    The returned function takes queries [T, D] of this rank, its candidates [C, D], its target ids [T] and the
    number of candidates of all ranks, and returns the summed loss of this rank's queries. A collective call.

    Cost: with gathered candidates, an all-gather of them and an all-reduce of their gradient; with gathered queries,
    all-gathers of queries and targets, all-reduces of three numbers per query and of the queries' gradient.
    """

    def cross_entropy(queries: Tensor, candidates: Tensor, targets: Tensor, num_candidates: int) -> Tensor:
        if num_candidates <= sum(context.targets_per_rank):
            counts = [stop - start for start, stop in context.ranges(num_candidates)]
            return _GatheredCandidates.apply(queries, candidates, targets, counts, context.rank)
        first, _ = context.own_range(num_candidates)
        return _GatheredQueries.apply(queries, candidates, targets, context.targets_per_rank, first).sum()

    return cross_entropy


class _GatheredCandidates(torch.autograd.Function):
    """Each rank's own queries against the candidates of all ranks."""

    @staticmethod
    def forward(
        ctx, queries: Tensor, candidates: Tensor, targets: Tensor, counts: list[int], rank: int
    ) -> Tensor:
        every = gather_rows(candidates, counts)
        loss, to_queries, to_candidates = cross_entropy_with_gradients(queries, every, targets)
        ctx.save_for_backward(to_queries, to_candidates)
        ctx.counts, ctx.rank = counts, rank
        return loss

    @staticmethod
    def backward(ctx, gradient: Tensor):
        to_queries, to_candidates = ctx.saved_tensors
        # Ranks may weigh their sums differently, so the weights go in before the gradients are added up.
        shared = to_candidates * gradient
        dist.all_reduce(shared)
        return to_queries * gradient, own_rows(shared, ctx.counts, ctx.rank), None, None, None


class _GatheredQueries(torch.autograd.Function):
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
