import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import sdpa_backward_flop_count

from cluster.process import Process
from tests.process_group import ALONE, run_on_processes
from trainer.learner import StepResult
from trainer.operations import counted_step

TARGETS = 5


def attention_and_product() -> StepResult:
    """Four tokens with two heads of width 8 see each other; a product with a matrix that is trained."""
    tokens, weights = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(2))
    attended = F.scaled_dot_product_attention(tokens, tokens, tokens)
    (attended.flatten(0, 2) @ weights.flatten(0, 2).T).sum().backward()
    return StepResult(loss_sum=torch.zeros(()), metrics={}, global_count=TARGETS)


def test_operations_of_forward_and_backward_are_those_worked_out_by_hand():
    _, operations = counted_step(attention_and_product, ALONE)
    product = 2 * 8 * 8 * 8  # [8, 8] with [8, 8]; twice as much backward
    attention = 2 * 2 * (2 * 4 * 4 * 8)  # scores and sums of two heads
    # Backward computes the scores again, and the gradients of queries, keys, values and weights.
    backward = sdpa_backward_flop_count(*[(1, 2, 4, 8)] * 4)
    assert backward == 5 * attention // 2
    assert operations == pytest.approx((3 * product + attention + backward) / TARGETS)


def test_a_step_without_targets_has_no_operations_per_target():
    result = StepResult(loss_sum=torch.zeros(()), metrics={}, global_count=0)
    assert counted_step(lambda: result, ALONE) == (result, None)


def on_ranks(process: Process) -> float | None:
    """The second rank does twice as much as the first."""

    def take() -> StepResult:
        for _ in range(process.rank + 1):
            torch.ones(4, 4) @ torch.ones(4, 4)
        return StepResult(loss_sum=torch.zeros(()), metrics={}, global_count=TARGETS)

    return counted_step(take, process)[1]


def test_operations_of_all_ranks_are_added_up():
    assert run_on_processes(on_ranks, 2) == [3 * 2 * 4**3 / TARGETS] * 2
