"""A moving average of the dense weights, which evaluation and export use in their place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sharding.state import Piece

AVERAGE, WEIGHT = "ema/", "dense/"


@runtime_checkable
class AveragedEngine(Protocol):
    """What the average needs of an engine."""

    average: "WeightAverage | None"

    def weights(self) -> list[Piece]:
        """The `dense/NAME` pieces this rank keeps, as live tensors, always in the same order."""

    def put(self, weights: list[Piece]) -> None:
        """Let the module compute with other values of `weights`; a collective call."""


class WeightAverage:
    """average = d average + (1 - d) weights after every step, d = min(decay, (1 + steps) / (10 + steps)).

    Early steps count for more, so that the initial weights are soon forgotten. Each rank averages the parts of the
    weights that it keeps, so nothing is exchanged.
    """

    def __init__(self, decay: float, weights: list[Piece]):
        self.decay = decay
        self.parts = [_renamed(piece, piece.tensor.detach().clone()) for piece in weights]

    def update(self, weights: list[Piece], steps: int) -> None:
        """Take in the weights after one more step; `steps` counts it."""
        average = get_ema_multi_avg_fn(min(self.decay, (1 + steps) / (10 + steps)))
        average([part.tensor for part in self.parts], [piece.tensor for piece in weights], steps)

    def restart(self, weights: list[Piece]) -> None:
        """Begin at these weights."""
        for part, piece in zip(self.parts, weights, strict=True):
            part.tensor.copy_(piece.tensor)


def _renamed(piece: Piece, tensor: Tensor) -> Piece:
    name = AVERAGE + piece.name.removeprefix(WEIGHT)
    return Piece(name=name, start=piece.start, global_shape=piece.global_shape, tensor=tensor)


def make_average(decay: float | None, weights: list[Piece]) -> WeightAverage | None:
    return None if decay is None else WeightAverage(decay, weights)


@contextmanager
def averaged(engine: AveragedEngine) -> Iterator[None]:
    """Inside, the module computes with the average of its weights, if there is one; a collective call."""
    if engine.average is None:
        yield
        return
    own = [
        Piece(
            name=piece.name, start=piece.start, global_shape=piece.global_shape, tensor=piece.tensor.clone()
        )
        for piece in engine.weights()
    ]
    engine.put(engine.average.parts)
    # Not put back after an error: it ends the run, and other ranks would not take part.
    yield
    engine.put(own)


def served_prefix(tensors: Mapping[str, Any]) -> str:
    """Which weights of a checkpoint are evaluated and exported: the average where it has one."""
    return AVERAGE if any(name.startswith(AVERAGE) for name in tensors) else WEIGHT
