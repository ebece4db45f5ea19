import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count

from cluster.process import Process
from tests.process_group import ALONE, run_on_processes
from trainer.learner import StepResult
from trainer.operations import (
    _grouped_product,
    _load_formulas,
    _recurrence,
    _recurrence_backward,
    counted_step,
)

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


def test_products_of_experts_are_counted_as_an_accelerator_does_them():
    rows, expand, ends = torch.randn(6, 16), torch.randn(2, 16, 8), torch.tensor([2, 6], dtype=torch.int32)

    def take() -> StepResult:
        F.grouped_mm(rows.bfloat16(), expand.bfloat16(), offs=ends)
        return StepResult(loss_sum=torch.zeros(()), metrics={}, global_count=1)

    assert counted_step(take, ALONE)[1] == 2 * 6 * 16 * 8
    # Backward: the gradients of the weights are summed within groups.
    assert _grouped_product((16, 6), (6, 8)) == 2 * 6 * 16 * 8
    assert _grouped_product((2, 3, 16), (2, 16, 8)) == 2 * 2 * 3 * 16 * 8


def test_recurrent_layers_of_an_accelerator_take_their_matrices_once_for_each_cell():
    weights = [(24, 8), (24, 8), (24,), (24,)]
    forward = 2 * 3 * 5 * 2 * 24 * 8
    assert _recurrence((3, 5, 8), weights, 4, None) == forward
    assert _recurrence_backward((3, 5, 8), weights, 4, None) == 2 * forward


def test_operations_of_jagged_attention_are_known_before_a_step_on_cuda_is_counted():
    _load_formulas(torch.device("cuda"))
    jagged = {"torch_attn._varlen_attn", "torch_attn._varlen_attn_backward"}
    assert jagged <= {str(operation) for operation in flop_registry}
