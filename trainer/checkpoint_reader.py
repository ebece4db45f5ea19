"""Reading any rows of any tensor of a checkpoint, whatever ranks wrote them; runs no code found in it."""

import errno
import json
import logging
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.errors import CheckpointError, DamagedCheckpointError
from cluster.storage import Storage
from trainer.checkpoint_layout import (
    STATE,
    Block,
    SavedTensor,
    Segment,
    best_step,
    committed_directories,
    decode_state,
    index_tensors,
    latest_step,
)

logger = logging.getLogger(__name__)


class CheckpointReader:
    """One complete checkpoint: "latest", "best" (the latest where none was marked) or a step number.

    Every block that is read is checked against its checksum.

    Raises: CheckpointError naming the file that is missing or damaged.
    """

    def __init__(self, storage: Storage, step: int | str = "latest"):
        self._storage = storage
        self._directory = _find_directory(storage, step)
        state = decode_state(self._read(STATE), self._path(STATE))
        self.step: int = state["step"]
        self.world_size: int = state["world_size"]
        self.shared_state: dict[str, Any] = state["shared_state"]
        self._check_presence(state["ranks"])
        self._bin_bytes: dict[str, int] = {entry["bin"]: entry["bin_bytes"] for entry in state["ranks"]}
        documents = [self._read_index(entry) for entry in state["ranks"]]
        self.rank_states: list[dict[str, Any]] = [document["rank_state"] for document in documents]
        self._tensors = index_tensors(documents)
        self._last_block: tuple[str, int, bytes] = ("", 0, b"")

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Global shape and type of every tensor, by name."""
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()}

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop (exclusive) of a tensor; a scalar is row 0..1."""
        saved = self._find_tensor(name)
        shape = (stop - start, *saved.shape[1:]) if saved.shape else ()
        return self.read_into(name, start, torch.empty(shape, dtype=saved.dtype))

    def read_into(self, name: str, start: int, tensor: Tensor) -> Tensor:
        """Fill `tensor` with the rows from `start` on, in place."""
        saved = self._find_tensor(name)
        self._check_request(name, saved, start, tensor)
        tensor = tensor.detach()
        direct = tensor.is_contiguous() and tensor.device.type == "cpu"
        target = tensor if direct else torch.empty(tensor.shape, dtype=tensor.dtype)
        stop = start + (tensor.shape[0] if tensor.dim() else 1)
        view = target.reshape(-1).view(torch.uint8).numpy()
        size = saved.row_bytes
        for part in saved.segments:
            low, high = max(start, part.start), min(stop, part.stop)
            if low < high:
                out = view[(low - start) * size : (high - start) * size]
                self._read_segment(part, (low - part.start) * size, out)
        return tensor if direct else tensor.copy_(target)

    def _read_segment(self, segment: Segment, first: int, out: np.ndarray) -> None:
        """Copy the bytes from `first` on of a segment, read as whole blocks since checksums cover blocks."""
        last, begin = first + len(out), 0
        for block in segment.blocks:
            low, high = max(first, begin), min(last, begin + block.bytes)
            if low < high:
                data = self._read_block(segment.file, block)
                out[low - first : high - first] = np.frombuffer(data, np.uint8)[low - begin : high - begin]
            begin += block.bytes

    def _read_block(self, file: str, block: Block) -> bytes:
        # Neighbouring row ranges, as an export reads them, share a block.
        if self._last_block[:2] == (file, block.offset):
            return self._last_block[2]
        data = self._read(file, block.offset, block.offset + block.bytes)
        if len(data) != block.bytes:
            raise DamagedCheckpointError(
                f"{self._path(file)} must have {self._bin_bytes[file]} bytes but ends after "
                f"{block.offset + len(data)}: the file is truncated. Use another step."
            )
        if zlib.crc32(data) != block.crc32:
            raise DamagedCheckpointError(
                f"{self._path(file)} does not match its checksum in bytes {block.offset}.."
                f"{block.offset + block.bytes}: the file is damaged. Use another step."
            )
        self._last_block = (file, block.offset, data)
        return data

    def _read_index(self, entry: dict[str, Any]) -> dict[str, Any]:
        name = entry["index"]
        data = self._read(name)
        if len(data) != entry["index_bytes"] or zlib.crc32(data) != entry["index_crc32"]:
            raise DamagedCheckpointError(
                f"{self._path(name)} does not match its size and checksum in {STATE}: the file is damaged. "
                "Use another step."
            )
        return json.loads(data)

    def _check_presence(self, entries: list[dict[str, Any]]) -> None:
        there = set(self._storage.list(self._directory))
        needed = [entry[kind] for entry in entries for kind in ("index", "bin")]
        if missing := [name for name in needed if name not in there]:
            raise DamagedCheckpointError(
                f"{self._path(STATE)} names {len(needed)} files of {len(entries)} ranks, but "
                f"{', '.join(missing[:5])} ({len(missing)} in all) cannot be found. Use another step."
            )

    def _check_request(self, name: str, saved: SavedTensor, start: int, tensor: Tensor) -> None:
        stop = start + (tensor.shape[0] if tensor.dim() else 1)
        same_rank = tensor.dim() == len(saved.shape)
        if not same_rank or tuple(tensor.shape[1:]) != saved.shape[1:] or tensor.dtype != saved.dtype:
            raise CheckpointError(
                f"{self._path('')} holds {name} as {list(saved.shape)} {saved.dtype}; it cannot fill "
                f"{list(tensor.shape)} {tensor.dtype}. The model must be "
                "the one that was saved."
            )
        if start < 0 or stop > saved.num_rows:
            raise CheckpointError(
                f"{self._path('')} holds {saved.num_rows} rows of {name}, but {start}..{stop} were asked for."
            )

    def _find_tensor(self, name: str) -> SavedTensor:
        if name not in self._tensors:
            raise CheckpointError(
                f"{self._path('')} holds no tensor {name!r}; it has {', '.join(sorted(self._tensors)[:10])}. "
                "The model must be the one that was saved."
            )
        return self._tensors[name]

    def _read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        try:
            return self._storage.read(f"{self._directory}/{name}", start, stop)
        except OSError as error:
            # So a disk tells of a block that is lost, and a file system that checks its own sums of a wrong one.
            is_lost = self._storage.is_local and error.errno == errno.EIO
            if is_lost or isinstance(error, FileNotFoundError):
                raise DamagedCheckpointError(
                    f"{self._path(name)} cannot be read: {error}. Use another step."
                ) from error
            raise CheckpointError(f"{self._path(name)} cannot be read: {error}. Try again.") from error

    def _path(self, name: str) -> str:
        return self._storage.path(f"{self._directory}/{name}".rstrip("/"))


def _find_directory(storage: Storage, step: int | str) -> str:
    directories = committed_directories(storage)
    if not directories:
        raise CheckpointError(
            f"{storage.path('')} holds no complete checkpoint; train first, or name another run."
        )
    if step == "best":
        number = best_step(storage)
        if number is None:
            logger.warning("No checkpoint in %s is marked as best; the latest is used.", storage.path(""))
            number = latest_step(storage)
    elif step == "latest":
        number = latest_step(storage)
    elif isinstance(step, int) or step.isdecimal():
        number = int(step)
    else:
        raise CheckpointError(f"{step!r} names no checkpoint; give latest, best or a step, such as 100.")
    if number not in directories:
        raise CheckpointError(
            f"{storage.path('')} holds no complete checkpoint of step {number}; it has {list(directories)}."
        )
    return directories[number]
