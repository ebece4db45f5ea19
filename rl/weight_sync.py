"""Dense weights from the learners to those who draw: gathered on rank 0, then one flat array for all of them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.process import Process
from trainer.plain_engine import named_state, named_trainable
from trainer.weight_average import AveragedEngine

FETCH_TIMEOUT_S = 60.0
BUCKET_VALUES = 4 * 2**20
"""Weights that are gathered or sent at a time: 16 MiB."""

Layout = tuple[tuple[str, int], ...]
"""Names and sizes, in the order of a flat array."""


@dataclass(frozen=True, kw_only=True)
class FlatWeights:
    """All dense weights of a policy behind each other."""

    layout: Layout
    values: Tensor
    """[sum of the sizes] fp32, on the host."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Name -> flat array on the host."""
        cuts = np.cumsum([size for _, size in self.layout])[:-1]
        parts = np.split(self.values.numpy(), cuts)
        return {name: part for (name, _), part in zip(self.layout, parts, strict=True)}


def gather_weights(engine: AveragedEngine, process: Process) -> FlatWeights | None:
    """All dense weights on rank 0, None on the others, whatever ZeRO stage or expert parallelism; a collective call.

    Cost: one reduction of all dense weights, a bucket at a time, so that the others need no room for a whole model.
    """
    layout = tuple((name, int(np.prod(shape))) for name, shape in engine.dense_shapes().items())
    places = {name: first for name, first, _ in _places(layout)}
    # A rank may keep no piece at all, where the model is small.
    own = [(places[piece.name.split("/", 1)[1]] + piece.start, piece.tensor) for piece in engine.weights()]
    total = sum(size for _, size in layout)
    values = torch.empty(total) if process.rank == 0 else None
    for first in range(0, total, BUCKET_VALUES):
        bucket = torch.zeros(min(BUCKET_VALUES, total - first), device=process.device)
        _fill_in(bucket, first, own)
        if process.world_size > 1:
            dist.reduce(bucket, dst=0)
        if values is not None:
            values[first : first + len(bucket)] = bucket
    return None if values is None else FlatWeights(layout=layout, values=values)


def _fill_in(bucket: Tensor, first: int, pieces: Iterable[tuple[int, Tensor]]) -> None:
    """Copy what lies in the range of the bucket, which begins at the place `first` of the flat array."""
    last = first + len(bucket)
    for start, tensor in pieces:
        begin, end = max(start, first), min(start + len(tensor), last)
        if begin < end:
            bucket[begin - first : end - first] = tensor[begin - start : end - start]


def put_weights(module: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Fill a whole model."""
    for name, flat in _flat_tensors(module).items():
        if flat.device.type == "cpu":
            np.copyto(flat.numpy(), weights[name])
        else:
            flat.copy_(torch.tensor(weights[name]))


def put_range(module: nn.Module, layout: Layout, first: int, values: Tensor) -> None:
    """Fill what a range of the flat array holds, from its place `first` on. Shapes: values [n]."""
    tensors, last = _flat_tensors(module), first + len(values)
    for name, start, stop in _places(layout):
        begin, end = max(start, first), min(stop, last)
        if begin < end:
            tensors[name][begin - start : end - start] = values[begin - first : end - first]


def _flat_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.detach().view(-1) for name, tensor in [*named_trainable(module), *named_state(module)]
    }


def _places(layout: Layout) -> Iterator[tuple[str, int, int]]:
    """(name, first place, place behind the last)."""
    start = 0
    for name, size in layout:
        yield name, start, start + size
        start += size
