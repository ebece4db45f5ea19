"""Exchanges between ranks whose parts differ in length.

On one process alone they give back what they were given; `process` is None where there is no process group.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.process import Process, all_gather_equal


def exchange_integers(numbers: Sequence[int], process: Process | None) -> list[tuple[int, ...]]:
    """The numbers of every rank, in the order of ranks; a collective on the host."""
    if process is None or process.world_size == 1:
        return [tuple(numbers)]
    own = torch.tensor(numbers, dtype=torch.int64)
    gathered = own.new_empty(process.world_size * len(numbers))
    all_gather_equal(gathered, own, group=process.host_group)
    return [tuple(row) for row in gathered.view(process.world_size, -1).tolist()]


def gather_rows(values: Tensor, counts: Sequence[int]) -> Tensor:
    """The values of all ranks in the order of ranks; parts are padded to one length for the collective.

    Shapes: values [counts[rank], ...] -> [sum(counts), ...].
    """
    if len(counts) == 1:
        return values.detach()
    longest = max(counts)
    if longest == 0:
        return values.detach()
    padded = values.new_zeros(longest, *values.shape[1:])
    padded[: values.shape[0]] = values.detach()
    gathered = values.new_empty(len(counts) * longest, *values.shape[1:])
    all_gather_equal(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered.split(longest), counts, strict=True)])


def own_rows(values: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """What this rank gave to `gather_rows`, or the results in its place. Shapes: [sum(counts), ...]."""
    start = sum(counts[:rank])
    return values[start : start + counts[rank]].clone()


def gather_rows_with_gradient(counts: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """`gather_rows` whose backward hands every rank the summed gradients of its rows; collective calls.

    Cost: beside the gathering, each rank sends the gradients of all rows once.
    """
    return lambda values: _GatherRows.apply(values, counts)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.counts = counts
        return gather_rows(values, counts)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return rows_to_owners(gradient.contiguous(), ctx.counts, dist.get_rank()).sum(0), None


def rows_to_owners(values: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """What every rank has found out about this rank's rows.

    Shapes: W ranks; values [sum(counts), ...] -> [W, counts[rank], ...].
    """
    if len(counts) == 1:
        return values[None]
    received = values.new_empty(len(counts) * counts[rank], *values.shape[1:])
    dist.all_to_all_single(
        received, values, output_split_sizes=[counts[rank]] * len(counts), input_split_sizes=list(counts)
    )
    return received.view(len(counts), counts[rank], *values.shape[1:])


def sum_over_ranks(values: Tensor, world_size: int) -> Tensor:
    """Add up in place."""
    if world_size > 1:
        dist.all_reduce(values)
    return values


def gather_on_first(values: Tensor, counts: Sequence[int], process: Process | None) -> Tensor | None:
    """The values of all ranks on the host of rank 0, None on the others. Shapes: as `gather_rows`."""
    values = values.cpu()
    if process is None or process.world_size == 1:
        return values
    padded = values.new_zeros(max(counts), *values.shape[1:])
    padded[: values.shape[0]] = values
    parts = [torch.empty_like(padded) for _ in counts] if process.rank == 0 else None
    dist.gather(padded, parts, dst=0, group=process.host_group)
    if parts is None:
        return None
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def broadcast_json(value: Any, process: Process | None) -> Any:
    """Rank 0's value, made of plain JSON values, on every rank."""
    if process is None or process.world_size == 1:
        return value
    text = json.dumps(value).encode() if process.rank == 0 else b""
    ((size,), *_) = exchange_integers([len(text)], process)
    content = torch.zeros(size, dtype=torch.uint8)
    if process.rank == 0:
        content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(content, src=0, group=process.host_group)
    return json.loads(content.numpy().tobytes())


def gather_objects(value: Any, process: Process | None) -> list[Any] | None:
    """What every rank gave, in the order of ranks, on rank 0; None on the others. For a few megabytes of NumPy."""
    if process is None or process.world_size == 1:
        return [value]
    found = [None] * process.world_size if process.rank == 0 else None
    dist.gather_object(value, found, dst=0, group=process.host_group)
    return found


def scatter_objects(values: Sequence[Any] | None, process: Process | None) -> Any:
    """This rank's one of the values that rank 0 gives, one for each rank."""
    if process is None or process.world_size == 1:
        return values[0]
    own: list[Any] = [None]
    dist.scatter_object_list(own, list(values) if values else None, src=0, group=process.host_group)
    return own[0]
