"""The plain operators that a profile is compared with compute what the kernels do."""

import pytest

from benchmarks.setting.plain_operators import plain_operators
from tests.training_cases import Case, train


@pytest.mark.parametrize("model", ["hstu", "sasrec"])
def test_plain_operators_train_alike(model):
    case = Case(model=model, objective="full", steps=3)
    expected, _ = train(None, case)
    with plain_operators():
        losses, _ = train(None, case)
    assert losses == pytest.approx(expected, rel=1e-5)
