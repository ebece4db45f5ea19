"""Saving the state of a job while it goes on training.

The state is a set of global tensors. Each rank owns row ranges of them and writes only those: nothing is
gathered.
"""

import json
import logging
import re
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from io import IOBase
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.errors import CheckpointError, ConfigError, MissingRanksError
from cluster.retries import retried
from cluster.storage import Storage
from sharding.state import Piece
from trainer.checkpoint_commit import SaveTarget, commit, remove_leftovers, remove_old_steps
from trainer.checkpoint_layout import DTYPES, Block, count_rows

BLOCK_BYTES = 32 << 20

logger = logging.getLogger(__name__)


class Checkpointer:
    """Writes checkpoints in the background; every rank has one and all call `save` for the same steps.

    The root of the storage is the run's folder of checkpoints. `attempt` is a token of this start of the job,
    the same on all ranks and new after a restart. Staging takes as much host memory as the rank's own state.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        rank: int,
        world_size: int,
        attempt: str,
        keep_last: int,
        gather_timeout_s: float = 600.0,
        on_commit: Callable[[int], None] = lambda step: None,
    ):
        """`on_commit` is called on rank 0, by the writing thread, with the step of each complete checkpoint."""
        if keep_last < 1:
            raise ConfigError(f"train.keep-last must be at least 1, got {keep_last}")
        if not re.fullmatch(r"[\w-]+", attempt):
            raise ConfigError(f"an attempt token has letters, digits, _ and - only, given {attempt!r}.")
        self._storage, self._rank, self._world_size = storage, rank, world_size
        self._attempt, self._keep_last, self._gather_timeout_s = attempt, keep_last, gather_timeout_s
        self._on_commit = on_commit
        self._sequence = 0
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._writer: _BackgroundWrite | None = None
        if rank == 0:
            remove_leftovers(storage, attempt)

    def prepare(self, pieces: list[Piece]) -> None:
        """Make the staging memory ready, so that the first save holds training no longer than later ones.

        Only names, shapes and types of the pieces count; call it once, before the first step.
        """
        for piece in pieces:
            _check_piece(piece)
            self._buffers[piece.name, piece.start] = _new_buffer(piece.tensor).zero_()

    def save(
        self,
        step: int,
        pieces: list[Piece],
        *,
        rank_state: Mapping[str, Any],
        shared_state: Mapping[str, Any],
        best: bool = False,
    ) -> None:
        """Copy the pieces and return; a background thread writes them.

        `rank_state` is kept for each rank, `shared_state` is taken from rank 0; both are plain JSON values.
        Tensors and states may change as soon as this returns.

        Raises: CheckpointError if the previous save could not be written; nothing is saved then.
        """
        self._sequence += 1
        if self._writer is not None and self._writer.is_alive():
            started = time.perf_counter()
            self._writer.join()
            waited_s = time.perf_counter() - started
            logger.warning("Step %d waited %.1f s for the previous checkpoint to be written.", step, waited_s)
        self.wait()
        target = SaveTarget.of(self._storage, step, self._attempt, self._sequence)
        # Text now, not in the thread: the caller goes on changing these dictionaries.
        rank_text, shared_text = (
            _json_text("rank_state", rank_state),
            _json_text("shared_state", shared_state),
        )
        work = partial(self._write, target, self._stage(pieces), rank_text, shared_text, best)
        self._writer = _BackgroundWrite(work, step)
        self._writer.start()

    def wait(self) -> None:
        """Return when the last save is written; on rank 0 the checkpoint is then complete.

        Raises: CheckpointError if it could not be written.
        """
        writer, self._writer = self._writer, None
        if writer is None:
            return
        writer.join()
        if isinstance(writer.error, MissingRanksError):
            raise writer.error
        if not writer.finished:
            cause = writer.error or "the writing thread died, its traceback was printed"
            raise CheckpointError(
                f"the checkpoint of step {writer.step} could not be written to {self._storage.path('')}: "
                f"{cause}. Make room or mend the cause; checkpoints of earlier steps are intact."
            ) from writer.error

    def close(self) -> None:
        """Wait for the last save and give the staging memory back."""
        self.wait()
        self._buffers.clear()

    def _stage(self, pieces: list[Piece]) -> list[Piece]:
        """Copy into host buffers that stay from save to save: fresh memory costs several copies."""
        for piece in pieces:
            _check_piece(piece)
        if len({(piece.name, piece.start) for piece in pieces}) < len(pieces):
            raise CheckpointError(f"rank {self._rank} gave the same rows of a tensor twice; give each once.")
        previous, self._buffers = self._buffers, {}
        staged = []
        for piece in pieces:
            key, tensor = (piece.name, piece.start), piece.tensor.detach()
            buffer = previous.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = _new_buffer(tensor)
            buffer.copy_(tensor, non_blocking=True)
            self._buffers[key] = buffer
            staged.append(replace(piece, tensor=buffer))
        if any(piece.tensor.is_cuda for piece in pieces):
            torch.cuda.synchronize()
        return staged

    def _write(
        self, target: SaveTarget, pieces: list[Piece], rank_text: str, shared_text: str, best: bool
    ) -> None:
        started = time.perf_counter()
        try:
            num_bytes = self._write_patiently(target, pieces, rank_text)
            if self._rank == 0:
                commit(
                    self._storage,
                    target,
                    world_size=self._world_size,
                    shared_state=json.loads(shared_text),
                    best=best,
                    timeout_s=self._gather_timeout_s,
                )
                self._on_commit(target.step)
                remove_old_steps(self._storage, target.step, self._keep_last)
        except (OSError, CheckpointError):
            self._remove_own_files(target)
            raise
        seconds = time.perf_counter() - started
        logger.info("Wrote %.1f MB of checkpoint step %d in %.1f s.", num_bytes / 1e6, target.step, seconds)

    def _write_patiently(self, target: SaveTarget, pieces: list[Piece], rank_text: str) -> int:
        """Begin again where the connection to an object store was lost in mid-write; the data is still staged."""
        if self._storage.is_local:
            return self._write_own_files(target, pieces, rank_text)
        return retried(
            lambda: self._write_own_files(target, pieces, rank_text), f"writing checkpoint step {target.step}"
        )

    def _write_own_files(self, target: SaveTarget, pieces: list[Piece], rank_text: str) -> int:
        bin_name, records, offset = target.bin_name(self._rank), [], 0
        with self._storage.open_write(f"{target.directory}/{bin_name}") as file:
            for piece in pieces:
                blocks = _write_blocks(file, piece.tensor, offset)
                offset = blocks[-1].offset + blocks[-1].bytes if blocks else offset
                records.append(_describe(piece, blocks))
        document = {
            "rank": self._rank,
            "bin": bin_name,
            "bin_bytes": offset,
            "pieces": records,
            "rank_state": json.loads(rank_text),
        }
        # The index comes last: rank 0 takes its presence as a sign that the rank has finished.
        index_name = f"{target.directory}/{target.index_name(self._rank)}"
        self._storage.write(index_name, json.dumps(document).encode())
        return offset

    def _remove_own_files(self, target: SaveTarget) -> None:
        """Give the space of a failed save back; a committed one has left this place already."""
        if self._storage.is_local and self._rank == 0:
            self._storage.delete(target.directory)
        elif self._storage.is_local:
            self._storage.delete(f"{target.directory}/{target.bin_name(self._rank)}")


class _BackgroundWrite(threading.Thread):
    """Runs the write and keeps its error. A daemon: a dying process must not wait for other ranks."""

    def __init__(self, work: Callable[[], None], step: int):
        super().__init__(name=f"checkpoint-{step}", daemon=True)
        self._work, self.step = work, step
        self.finished = False
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._work()
            self.finished = True
        except (OSError, CheckpointError) as error:
            self.error = error


def _new_buffer(tensor: Tensor) -> Tensor:
    if tensor.is_cuda or tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    # numpy asks Linux for huge pages, torch does not: the first copy into them is about five times as fast.
    data = np.empty(tensor.numel() * tensor.dtype.itemsize, np.uint8)
    return torch.from_numpy(data).view(tensor.dtype).reshape(tensor.shape)


def _write_blocks(file: IOBase, tensor: Tensor, offset: int) -> list[Block]:
    data, blocks = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), []
    for first in range(0, len(data), BLOCK_BYTES):
        part = data[first : first + BLOCK_BYTES]
        file.write(part)
        blocks.append(Block(offset=offset + first, bytes=len(part), crc32=zlib.crc32(part)))
    return blocks


def _describe(piece: Piece, blocks: list[Block]) -> dict[str, Any]:
    return {
        "name": piece.name,
        "start": piece.start,
        "rows": piece.num_rows,
        "shape": list(piece.global_shape),
        "dtype": str(piece.tensor.dtype).removeprefix("torch."),
        "blocks": [asdict(block) for block in blocks],
    }


def _check_piece(piece: Piece) -> None:
    shape, num_global = tuple(piece.tensor.shape), count_rows(piece.global_shape)
    fits = piece.start >= 0 and piece.start + piece.num_rows <= num_global
    if not fits or shape[1:] != piece.global_shape[1:] or len(shape) != len(piece.global_shape):
        raise CheckpointError(
            f"rows {piece.start}..{piece.start + piece.num_rows} of {piece.name} with shape {list(shape)} "
            f"are no part of its global shape {list(piece.global_shape)}; correct start or global_shape."
        )
    if piece.tensor.dtype not in DTYPES.values():
        raise CheckpointError(
            f"{piece.name} has type {piece.tensor.dtype}; checkpoints hold {', '.join(DTYPES)}."
        )


def _json_text(what: str, state: Mapping[str, Any]) -> str:
    try:
        return json.dumps(state)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{what} must hold plain JSON values: {error}. Turn it into numbers and text."
        ) from error
