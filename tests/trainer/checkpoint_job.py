"""A job of several ranks, played by one process: each rank saves its rows of the same global tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cluster.storage import Storage
from sharding.state import Piece
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_reader import CheckpointReader

State = Mapping[str, Tensor]


def cut(state: State, rank: int, world_size: int) -> list[Piece]:
    """This rank's rows; ranks own unequal shares, other ones at each world size."""
    pieces = []
    for name, tensor in state.items():
        rows = tensor.shape[0] if tensor.dim() else 1
        start, stop = rows * rank**2 // world_size**2, rows * (rank + 1) ** 2 // world_size**2
        if stop > start or rows == 0:
            part = tensor[start:stop] if tensor.dim() else tensor
            pieces.append(Piece(name=name, start=start, global_shape=tuple(tensor.shape), tensor=part))
    return pieces


class Job:
    """All ranks of one start of a job."""

    def __init__(self, storage: Storage, world_size: int = 1, attempt: str = "first", keep_last: int = 2):
        self.ranks = [
            Checkpointer(
                storage,
                rank=rank,
                world_size=world_size,
                attempt=attempt,
                keep_last=keep_last,
                gather_timeout_s=0.3,
            )
            for rank in range(world_size)
        ]

    def save(self, step: int, state: State, best: bool = False, **shared_state) -> None:
        """Save and wait; rank 0 comes last, as it waits for the others."""
        for rank in reversed(range(len(self.ranks))):
            self.ranks[rank].save(
                step,
                cut(state, rank, len(self.ranks)),
                rank_state={"rank": rank, "stream": 10 * rank + step},
                shared_state={"step": step, **shared_state},
                best=best,
            )
            self.ranks[rank].wait()


def filled(value: float) -> dict[str, Tensor]:
    """A small state whose every element is `value`, to tell saves apart."""
    return {"table/item": torch.full((9, 4), value), "dense/weight": torch.full((7,), value)}


def load(storage: Storage, step: int | str = "latest") -> dict[str, Tensor]:
    reader = CheckpointReader(storage, step)
    return {
        name: reader.read_rows(name, 0, shape[0] if shape else 1)
        for name, (shape, _) in reader.tensors.items()
    }
