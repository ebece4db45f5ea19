import sys

import pytest
import torch

from cluster.errors import DivergenceError
from tests.process_group import run_on_processes
from tests.training_cases import Case, make_batch, make_learner, prepare, run_steps, state_of
from trainer.configuration import TrainConfig
from trainer.schedule import rate_fraction
from trainer.step_input import split_users


def poison(learner, where):
    """Make something of one rank's step infinite."""
    if where == "loss":
        learner.module.model.final_norm.register_forward_hook(
            lambda _module, _inputs, output: output * torch.inf
        )
    elif where == "weight gradient":
        weight = learner.module.model.blocks[0].attention_output.weight
        weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), torch.inf))
        # The check's own hook came first; hooks run in order and each sees the gradient of the one before.
        learner.check.__init__(learner.module)
    else:
        rows = learner.module.model.input_dropout
        rows.register_full_backward_hook(lambda _module, gradients, _out: (gradients[0] * torch.nan,))


def diverge(process, case, where):
    learner = make_learner(case, process)
    run_steps(case, process, learner, 0, 2)
    before = state_of(learner)
    if process.rank == 1:
        poison(learner, where)
    try:
        run_steps(case, process, learner, 2, 1)
    except DivergenceError as error:
        same = all(torch.equal(a[2], b[2]) for a, b in zip(before, state_of(learner), strict=True))
        return str(error), same
    return "no error", False


@pytest.mark.parametrize("where", ["loss", "weight gradient", "row gradient"])
def test_a_value_that_is_not_finite_stops_all_ranks_and_changes_nothing(where):
    (other, kept_0), (own, kept_1) = run_on_processes(diverge, 2, Case(zero_stage=0), where)
    assert kept_0 and kept_1
    assert "at step 2 they are not on rank 1 with users [" in own
    assert other == own, "whichever rank is heard first tells it"
    assert "must be finite" in own and "lower train.learning-rate" in own


def compilers_after_a_step(process, case):
    run_steps(case, process, make_learner(case, process), 0, 1)
    return [name for name in sys.modules if name.startswith("torch._inductor.codegen")]


def test_workers_start_without_loading_the_compiler():
    assert run_on_processes(compilers_after_a_step, 1, Case(zero_stage=1)) == [[]]


def engine_beside_an_accelerator(process, stage):
    """What DeepSpeed made for a worker on the processor that sees an accelerator, and how often it waited for one."""
    from unittest import mock

    from deepspeed.accelerator import get_accelerator

    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch.object(type(get_accelerator()), "synchronize") as waits,
    ):
        learner = make_learner(Case(zero_stage=stage), process)
        waits.reset_mock()
        run_steps(Case(zero_stage=stage), process, learner, 0, 4)
    zero = learner.engine.engine.optimizer
    num_weights = sum(place.numel for place in learner.engine._places.values())
    return learner.engine.engine.zero_overlap_comm(), zero.reduce_bucket_size / num_weights, waits.call_count


@pytest.mark.parametrize("stage", [1, 3])
def test_the_engine_goes_by_the_device_of_the_worker_and_takes_no_more_than_it_needs(stage):
    assert run_on_processes(engine_beside_an_accelerator, 1, stage) == [(False, 1.0, 0)]


def keep_updating_one_table_once(process, case):
    """Rows that several micro-batches and features share take one optimizer step, of their summed gradient."""
    learner = make_learner(case, process)
    calls = []
    update = learner.tables.update
    learner.tables.update = lambda *arguments: (calls.append(1), update(*arguments))
    run_steps(case, process, learner, 0, 3)
    return len(calls)


def test_a_step_has_one_sparse_update_whatever_its_micro_batches():
    assert run_on_processes(keep_updating_one_table_once, 1, Case(micro_batches=3)) == [3]


def gradients_averaged(process):
    from torchrec.distributed import comm_ops

    make_learner(Case(), process)
    return comm_ops.get_gradient_division()


def test_torchrec_divides_gradients_by_the_number_of_ranks():
    assert run_on_processes(gradients_averaged, 1) == [True]


def broken_start(process):
    """DeepSpeed is handed the tables too, as a careless model would do."""
    from unittest import mock

    from cluster.errors import PlanError
    from tests.training_cases import make_model
    from trainer import start

    learner = make_learner(Case(), process)

    class Assembly:
        tables, model, process = learner.tables, make_model(Case()), None
        config = mock.Mock()

        def module(self, _wrap):
            return None

    def overwrite(*_arguments):
        learner.tables.pieces()[0].tensor.add_(1)

    with mock.patch.object(start, "_make_engine", overwrite):
        try:
            start.make_learner(Assembly())
        except PlanError as error:
            return str(error)
    return "no error"


def test_rows_that_change_while_the_engine_starts_are_an_error():
    (message,) = run_on_processes(broken_start, 1)
    assert "must lie outside of the module that DeepSpeed wraps" in message and "table/item" in message


def test_micro_batches_split_users_by_tokens():
    users = [torch.arange(length + 1) for length in (10, 1, 1, 1, 1, 10, 3, 3)]
    batch = make_batch(users)
    parts = split_users(batch, 3)
    assert [part.num_users for part in parts] == [1, 5, 2]
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert [part.num_users for part in split_users(make_batch(users[:1]), 3)] == [1, 0, 0]


def test_the_schedule_warms_up_and_follows_half_a_cosine():
    config = TrainConfig(warmup_steps=10, final_rate_fraction=0.1)
    fractions = [rate_fraction(step, 110, config) for step in (0, 4, 9, 10, 60, 110, 500)]
    assert fractions == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.55, 0.1, 0.1]),
        (
            "inverse-sqrt",
            [
                0.5,
                1.0,
                0.1 + 0.9 * (10 / 11) ** 0.5,
                0.1 + 0.9 * (10 / 61) ** 0.5,
                0.1 + 0.9 * (10 / 111) ** 0.5,
                0.1 + 0.9 * (10 / 501) ** 0.5,
            ],
        ),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_other_schedules_go_on_from_the_same_warm_up(schedule, expected):
    final = 0.0 if schedule == "constant" else 0.1
    config = TrainConfig(warmup_steps=10, final_rate_fraction=final, schedule=schedule)
    fractions = [rate_fraction(step, 110, config) for step in (4, 9, 10, 60, 110, 500)]
    assert fractions == pytest.approx(expected, abs=1e-4)


def test_a_schedule_without_a_warm_up_begins_at_the_peak():
    for schedule in ("cosine", "linear", "inverse-sqrt", "constant"):
        assert rate_fraction(0, 100, TrainConfig(warmup_steps=0, schedule=schedule)) == 1.0


def test_preparing_a_step_asks_for_each_row_once():
    case = Case()
    learner = make_learner(case, None)
    prepared = prepare(case, learner.module.model, 0, 0, 1)
    ids = prepared.merged.tables["item"]
    assert len(ids) == len(ids.unique())
    micro = prepared.micro_batches[0]
    for name, positions in prepared.merged.positions[0].items():
        assert torch.equal(ids[positions], micro.ids[name])
