from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from cluster.errors import ConfigError
from models.layers.attention_plan import Plan
from models.layers.text_decoder import TextDecoder
from sharding.lookup import rows_of_request
from tests.process_group import run_on_processes
from tests.training_cases import Case, make_model, prepare, train
from trainer.blocks import compile_blocks, recompute_blocks
from trainer.dense_module import DenseModule

CASE = Case(dropout=0.3, steps=4)


def step_of(case, *, recompute=False, compiled=False):
    """Loss, gradients and bytes kept for the backward pass of one step on the dense part alone."""
    model = make_model(case)
    if recompute:
        recompute_blocks(model)
    if compiled:
        compile_blocks(model)
    prepared = prepare(case, model, 0, 0, 1)
    torch.manual_seed(1)
    table = torch.randn(len(prepared.merged.tables["item"]), 16).requires_grad_()
    micro = prepared.micro_batches[0]
    rows = rows_of_request(model.tables(), {"item": table}, micro.ids, prepared.merged.positions[0], {})
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # Hooks would be compiled along.
    counted = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with nullcontext() if compiled else counted:
        loss = DenseModule(model, case.precision)(rows, micro.batch, micro.context, 1.0)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss, {"table": table.grad, **gradients}, sum(kept.values())


def plain_and_compiled(process):
    """In a process of its own, where no checks of shapes are compiled along with the blocks."""
    # Traced and differentiated by torch.compile, but not turned into C++, which takes a minute.
    torch.compile = partial(torch.compile, backend="aot_eager")
    return [step_of(Case(model="hstu"), compiled=compiled)[:2] for compiled in (False, True)]


def test_recomputed_blocks_with_a_memory_give_the_same_loss_and_gradients():
    case = Case(model="tiger, causal encoder")
    prepared, found = prepare(case, make_model(case), 0, 0, 1), []
    for recompute in (False, True):
        model = make_model(case)
        if recompute:
            recompute_blocks(model)
        (micro,) = prepared.micro_batches
        loss = model({}, micro.batch, micro.context).sum
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_recomputed_blocks_give_the_same_loss_and_gradients_and_keep_less(precision):
    case = replace(CASE, precision=precision)
    wanted_loss, wanted, much = step_of(case, recompute=False)
    loss, gradients, little = step_of(case, recompute=True)
    assert torch.equal(loss, wanted_loss)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, wanted[name]), name
    assert little < much / 2


def test_compiled_blocks_give_the_same_loss_and_gradients():
    ((wanted_loss, wanted), (loss, gradients)) = run_on_processes(plain_and_compiled, 1)[0]
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-6, msg=name)


def text_plain_and_compiled(process):
    """Without dropout; and compiled with it."""
    torch.compile = partial(torch.compile, backend="aot_eager")
    found = []
    for compiled, dropout in ((False, 0.0), (True, 0.0), (True, 0.5)):
        torch.manual_seed(0)
        decoder = TextDecoder(
            vocabulary_size=5,
            width=8,
            num_blocks=2,
            num_heads=2,
            feedforward_width=8,
            dropout=dropout,
            init_scale=1.0,
        )
        if compiled:
            compile_blocks(decoder)
        hidden = decoder.vocabulary(torch.arange(5))
        found.append(decoder.run_layers(hidden, torch.arange(5), Alone(), 0, 2))
        found[-1].square().sum().backward()
        found.append(decoder.vocabulary.weight.grad)
    return found


class Alone(Plan):
    def attend(self, layer, queries, keys, values):
        return queries * keys * values


def test_compiled_blocks_of_a_text_decoder_give_the_same_states_and_gradients():
    plain, gradient, compiled, compiled_gradient, dropped, _ = run_on_processes(text_plain_and_compiled, 1)[0]
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(compiled_gradient, gradient)
    assert dropped.isfinite().all() and not torch.allclose(dropped, plain)


@pytest.mark.parametrize(("zero_stage", "dropout"), [(2, 0.3), (3, 0.3), (3, 0.0)])
def test_training_is_the_same_to_the_last_bit_at_every_zero_stage(zero_stage, dropout):
    case = replace(CASE, zero_stage=zero_stage, dropout=dropout, micro_batches=2)
    plain = run_on_processes(train, 2, case)
    recomputed = run_on_processes(train, 2, replace(case, activation_checkpointing=True))
    for (losses, state), (wanted_losses, wanted) in zip(recomputed, plain, strict=True):
        assert losses == wanted_losses
        for (name, _, tensor), (_, _, expected) in zip(state, wanted, strict=True):
            assert torch.equal(tensor, expected), name


def test_a_model_without_blocks_is_refused():
    with pytest.raises(
        ConfigError, match=r"needs a model with an nn\.ModuleList called blocks, and Linear has"
    ):
        recompute_blocks(nn.Linear(2, 2))
