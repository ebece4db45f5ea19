"""The average against a naive one, in evaluation, and through checkpoints."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from cluster.storage import Storage
from tests.process_group import run_on_processes
from tests.tiny_run import assert_same_state, build_tiny_data, run, tiny_config, with_train
from tests.training_cases import Case, join_pieces, make_learner, run_steps, state_of
from trainer.checkpoint_reader import CheckpointReader
from trainer.export import export_checkpoint
from trainer.plain_engine import named_trainable
from trainer.weight_average import averaged

DECAY = 0.6
CASE = Case(ema_decay=DECAY)


def naive_average(learner, steps):
    """The average of each parameter on one process, by its definition."""
    weights = dict(named_trainable(learner.module))
    found = {name: weight.detach().clone() for name, weight in weights.items()}
    for step in range(steps):
        run_steps(CASE, None, learner, step, 1)
        decay = min(DECAY, (2 + step) / (11 + step))
        found = {name: decay * old + (1 - decay) * weights[name].detach() for name, old in found.items()}
    return found


@cache
def expected():
    return naive_average(make_learner(CASE, None), 12)


def averages(per_rank):
    state = join_pieces(per_rank)
    return {name.removeprefix("ema/"): tensor for name, tensor in state.items() if name.startswith("ema/")}


def assert_is_the_average(found):
    assert found.keys() == expected().keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.view(-1), expected()[name].view(-1), atol=2e-5, rtol=1e-3)


def test_the_plain_engine_averages_by_the_definition():
    learner = make_learner(CASE, None)
    run_steps(CASE, None, learner, 0, 12)
    assert_is_the_average(averages([state_of(learner)]))


def train_and_look(process, case):
    """This rank's pieces, what the last norm computes with the average, and how training goes on after that."""
    learner = make_learner(case, process)
    run_steps(case, process, learner, 0, 12)
    pieces = state_of(learner)
    with averaged(learner.engine):
        users = torch.ones(3, case_width(learner))
        seen = learner.module.model.final_norm(users).detach()
    return pieces, seen, run_steps(case, process, learner, 12, 3), state_of(learner)


def case_width(learner):
    return learner.module.model.config.width


def train_only(process, case):
    learner = make_learner(case, process)
    return run_steps(case, process, learner, 0, 15)[12:], state_of(learner)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_every_zero_stage_averages_its_part_and_training_goes_on_untouched(zero_stage):
    case = replace(CASE, zero_stage=zero_stage)
    looked = run_on_processes(train_and_look, 2, case)
    assert_is_the_average(averages([pieces for pieces, *_ in looked]))
    plain = run_on_processes(train_only, 2, replace(case, ema_decay=None))
    bias = expected()["final_norm.bias"]
    for (_, seen, losses, state), (wanted_losses, wanted) in zip(looked, plain, strict=True):
        # A normalised row of ones is zero, so the bias alone is left.
        torch.testing.assert_close(seen, bias.expand(3, -1), atol=2e-5, rtol=1e-3)
        assert losses == wanted_losses
        kept = [piece for piece in state if not piece[0].startswith("ema/")]
        for (name, _, tensor), (_, _, expected_tensor) in zip(kept, wanted, strict=True):
            assert torch.equal(tensor, expected_tensor), name


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_tiny_data(tmp_path_factory.mktemp("data"))


def test_resumed_on_other_workers_equals_uninterrupted(data, tmp_path):
    whole = tiny_config(data, tmp_path / "whole", ema_decay=0.9)
    parts = tiny_config(data, tmp_path / "parts", ema_decay=0.9, zero_stage=2)
    (expected_result, wanted), *_ = run_on_processes(run, 2, whole)
    first, *_ = run_on_processes(run, 2, parts, 3)
    (result, state), *_ = run_on_processes(run, 1, with_train(parts, zero_stage=3))
    assert 0 < first[0]["step"] < result["step"] == expected_result["step"]
    assert any(name.startswith("ema/") for name in state)
    assert_same_state(state, wanted, tolerance=2e-5)
    assert {**result, "best": pytest.approx(result["best"], rel=1e-3)} == expected_result


def serve(process, config):
    """Validation metrics and weights as the commands after training see them."""
    from trainer.assembly import assemble
    from trainer.evaluate import validation_metrics
    from trainer.run_state import load_weights

    assembly = assemble(config, process)
    load_weights(CheckpointReader(Storage(f"{config.run_dir}/checkpoints"), "latest"), assembly)
    users = assembly.users("valid")
    return validation_metrics(
        assembly.search(), users.batches(), empty_batch=users.empty_batch(), config=config.evaluation
    )


def test_validation_evaluation_and_export_use_the_average(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", ema_decay=0.95, epochs=1, learning_rate=0.05)
    (result, state), *_ = run_on_processes(run, 2, config)
    (metrics,) = run_on_processes(serve, 1, config)
    assert metrics["ndcg@10"] == pytest.approx(result["best"], rel=1e-6)
    reader = CheckpointReader(Storage(f"{config.run_dir}/checkpoints"), "latest")
    export_checkpoint(reader, tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in exported.items():
        assert torch.equal(tensor.view(-1), state[f"ema/{name}"])
    assert any(not torch.equal(state[f"ema/{name}"], state[f"dense/{name}"]) for name in exported)


def test_an_average_that_was_switched_on_later_begins_at_the_weights_of_the_checkpoint(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", epochs=1)
    ((first, before),) = run_on_processes(run, 1, config)
    longer = with_train(config, ema_decay=1 - 1e-9, max_steps=first["step"] + 1, epochs=2)
    ((_, state),) = run_on_processes(run, 1, longer)
    steps = first["step"] + 1
    decay = (1 + steps) / (10 + steps)
    for name in before:
        if name.startswith("dense/"):
            average = decay * before[name] + (1 - decay) * state[name]
            torch.testing.assert_close(state[name.replace("dense/", "ema/")], average)
