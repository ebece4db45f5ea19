"""Dense weights from the learners to those who draw: gathered on rank 0, shared by the object store as NumPy arrays."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from torch import nn

from cluster.process import Process
from cluster.shared_object import SharedObject
from trainer.plain_engine import named_state, named_trainable
from trainer.weight_average import AveragedEngine

FETCH_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class SharedWeights:
    """The weights of one policy, wherever they are wanted."""

    version: int
    weights: SharedObject
    """Name -> flat fp32 array."""


def gather_weights(engine: AveragedEngine, process: Process) -> dict[str, np.ndarray] | None:
    """All dense weights on rank 0, None on the others, whatever ZeRO stage or expert parallelism; a collective call.

    Cost: one reduction of all dense weights.
    """
    shapes = engine.dense_shapes()
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    starts = dict(zip(shapes, np.cumsum([0, *sizes]).tolist(), strict=False))
    pieces = engine.weights()
    joined = pieces[0].tensor.new_zeros(sum(sizes)) if pieces else None
    for piece in pieces:
        first = starts[piece.name.split("/", 1)[1]] + piece.start
        joined[first : first + piece.num_rows] = piece.tensor
    if process.world_size > 1:
        dist.reduce(joined, dst=0)
    if process.rank != 0:
        return None
    parts = np.split(joined.cpu().numpy(), np.cumsum(sizes)[:-1])
    return dict(zip(shapes, parts, strict=True))


def put_weights(module: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Fill a whole model on the host."""
    for name, tensor in [*named_trainable(module), *named_state(module)]:
        np.copyto(tensor.detach().numpy().reshape(-1), weights[name])
