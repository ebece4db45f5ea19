"""The cross-entropy over a vocabulary spread over ranks equals that of one process, whichever side travels."""

import pytest
import torch

from models.kernels.cross_entropy import reference_cross_entropy
from models.recommender import StepContext
from sharding.vocabulary_parallel import vocabulary_parallel_cross_entropy
from tests.process_group import run_on_processes

WEIGHTS = (0.3, 0.3, 0.3)


def make_inputs(counts, num_candidates):
    generator = torch.Generator().manual_seed(7)
    queries = torch.randn(sum(counts), 5, generator=generator).requires_grad_()
    candidates = torch.randn(num_candidates, 5, generator=generator).requires_grad_()
    return queries, candidates, torch.randint(num_candidates, (sum(counts),), generator=generator)


def loss_and_gradients(process, counts, num_candidates):
    """This rank's summed loss, and the gradients of what it holds."""
    torch.set_num_threads(1)
    queries, candidates, targets = make_inputs(counts, num_candidates)
    context = StepContext(
        step=0, rank=process.rank, world_size=process.world_size, targets_per_rank=tuple(counts)
    )
    first, last = context.own_range(num_candidates)
    start = sum(counts[: process.rank])
    own = slice(start, start + counts[process.rank])
    mine = queries.detach()[own].requires_grad_(), candidates.detach()[first:last].requires_grad_()
    loss = vocabulary_parallel_cross_entropy(context)(*mine, targets[own], num_candidates)
    (loss * WEIGHTS[process.rank]).backward()
    return loss.detach(), *(tensor.grad for tensor in mine)


@pytest.mark.parametrize("num_candidates", [9, 41])
@pytest.mark.parametrize("counts", [[13, 8, 6], [20, 0, 3]])
def test_it_equals_one_process(counts, num_candidates):
    """With 9 candidates these travel, with 41 the 27 or 23 queries do."""
    queries, candidates, targets = make_inputs(counts, num_candidates)
    expected = reference_cross_entropy(queries, candidates, targets, num_candidates)
    (expected * WEIGHTS[0]).backward()
    ranks = run_on_processes(loss_and_gradients, 3, counts, num_candidates)
    torch.testing.assert_close(sum(loss for loss, _, _ in ranks), expected.detach(), rtol=1e-5, atol=1e-5)
    for place, whole in ((1, queries), (2, candidates)):
        joined = torch.cat([rank[place] for rank in ranks])
        torch.testing.assert_close(joined, whole.grad, rtol=1e-4, atol=1e-6)
