"""Training on an accelerator is training on the processor; a pretended one stands in where there is none."""

from collections import Counter
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from tests.generator_cases import GENERATORS, PAGE_WISE, TREES
from tests.pretended_device import PRETENDED, PretendedDevice, no_real_device
from tests.training_cases import MODELS, OBJECTIVES, Case, join_pieces, make_learner, prepare, train
from trainer.dense_module import resolve_precision

CASES = [
    *(
        # Several queries of a position learn by sampled softmax alone.
        Case(model=model, objective="sampled" if model == "urm" else "full", steps=3)
        for model in MODELS
    ),
    *(Case(objective=objective, steps=3) for objective in OBJECTIVES),
    *(Case(model=model, steps=3) for model in {**GENERATORS, **PAGE_WISE, **TREES}),
]


PRETENDABLE = [case for case in CASES if case.model != "gru4rec"]
"""A recurrent layer calls what only a real accelerator has."""


def name_of(case: Case) -> str:
    return f"{case.model}, {case.objective}"


@cache
def on_the_processor(case: Case):
    losses, state = train(None, case)
    return losses, join_pieces([state])


def assert_same_training(case: Case, device: torch.device, tolerance: float) -> None:
    """Losses to the tolerance; the state to 1e-4, since Adam moves a weight whose gradient is all but rounding by a
    part of its rate of 1e-2.
    """
    losses, state = train(None, case, device)
    expected_losses, expected = on_the_processor(case)
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    for name, tensor in join_pieces([[(n, start, t.cpu()) for n, start, t in state]]).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3, msg=name)


@no_real_device
@pytest.mark.parametrize("case", PRETENDABLE, ids=name_of)
def test_no_operation_of_a_step_mixes_devices_and_only_the_check_of_the_loss_waits(case):
    with PretendedDevice() as device:
        assert_same_training(case, PRETENDED, 1e-5)
        learner = make_learner(case, None, PRETENDED)
        learner.engine.pieces()  # as a job takes staging memory before the first step
        for step in range(2):
            prepared = prepare(case, learner.module.model, step, 0, 1, PRETENDED)
            device.waits.clear()
            learner.step(prepared, 1e-2, 0.1)
    tables = len(learner.tables.specs)
    assert device.waits == Counter({"aten._local_scalar_dense": 1, "aten._unique2": tables}) - Counter()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator of CUDA")
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_training_on_cuda_is_training_on_the_processor(case, monkeypatch):
    # cuDNN's recurrent layers would round their inputs to 10 bits.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert_same_training(case, torch.device("cuda", 0), 1e-4)


@pytest.mark.parametrize(("generation", "precision"), [(7, torch.float32), (8, torch.bfloat16)])
def test_bf16_is_chosen_where_a_card_does_not_only_emulate_it(generation, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=generation))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert resolve_precision("auto", torch.device("cuda", 0)) == precision
