"""Names and JSON files of a run's checkpoints, and which of its steps are complete.

A checkpoint `step-00000100/` holds for each rank its tensor rows (`rank-00000.bin`: raw little-endian blocks,
one after another) and their index (`rank-00000.json`), and `state.json`, whose presence says that all of it
is there. Beside the checkpoints stand `LATEST` and `BEST`, each naming a step. Nothing in them is ever
executed.
"""

import json
import logging
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from cluster.errors import CheckpointError, DamagedCheckpointError
from cluster.storage import Storage
from trainer.checkpoint_pointers import BEST, LATEST, read_pointer

FORMAT_VERSION = 1
STATE = "state.json"
REPLACED = ".replaced"

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    )
}

_STEP = re.compile(r"step-(\d{8,})(\.replaced)?")
logger = logging.getLogger(__name__)


def step_directory(step: int) -> str:
    return f"step-{step:08d}"


def directory_step(name: str) -> int | None:
    """The step a directory name stands for, None for all other names."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def is_committed(storage: Storage, directory: str) -> bool:
    return storage.exists(f"{directory}/{STATE}")


def committed_directories(storage: Storage) -> dict[int, str]:
    """Step -> directory of every complete checkpoint, in the order of steps."""
    found: dict[int, str] = {}
    for name in storage.list():
        step = directory_step(name)
        # A directory sorts before its own replaced version, so the newer one wins.
        if step is not None and step not in found and is_committed(storage, name):
            found[step] = name
    return dict(sorted(found.items()))


def committed_steps(storage: Storage) -> list[int]:
    """Steps of all complete checkpoints, oldest first."""
    return list(committed_directories(storage))


def latest_step(storage: Storage) -> int | None:
    """The step to go on from: what LATEST names or, where that is unusable, the newest complete step."""
    steps = committed_steps(storage)
    named = read_pointer(storage, LATEST)
    if named in steps:
        return named
    if not steps:
        return None
    logger.warning(
        "%s names %s, which is no complete checkpoint; step %d is the newest complete one and is used.",
        storage.path(LATEST),
        "nothing" if named is None else f"step {named}",
        steps[-1],
    )
    return steps[-1]


def best_step(storage: Storage) -> int | None:
    """The step BEST names; None where none was marked or it is not complete."""
    named = read_pointer(storage, BEST)
    return named if named in committed_steps(storage) else None


def encode_state(content: Mapping[str, Any]) -> bytes:
    """JSON that carries its own checksum."""
    return json.dumps({**content, "crc32": _json_checksum(content)}, indent=1).encode()


def decode_state(data: bytes, path: str) -> dict[str, Any]:
    """Undo `encode_state`. Raises: CheckpointError for a damaged file or an unknown format version."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise DamagedCheckpointError(
            f"{path} must hold JSON but is damaged: {error}. Use another step."
        ) from error
    if not isinstance(content, dict) or "format_version" not in content:
        raise DamagedCheckpointError(
            f"{path} must name its format_version but does not: damaged, or no grail checkpoint. Use another step."
        )
    if "crc32" not in content:
        _check_version(content["format_version"], path)
    if content.pop("crc32", None) != _json_checksum(content):
        raise DamagedCheckpointError(
            f"{path} does not match its checksum: the file is damaged. Use another step."
        )
    _check_version(content["format_version"], path)
    return content


def _check_version(version: Any, path: str) -> None:
    if version == FORMAT_VERSION:
        return
    is_older = isinstance(version, int) and version < FORMAT_VERSION
    advice = (
        "an older one that nothing here translates. Go on with the version of grail that wrote it, or start a new "
        "run directory"
        if is_older
        else "Use the version of grail that wrote it, or a newer one"
    )
    raise CheckpointError(
        f"{path} has format version {version!r}; this program knows version {FORMAT_VERSION}. {advice}."
    )


def _json_checksum(content: Mapping[str, Any]) -> int:
    # Through JSON once: keys become strings before they are sorted, as a reader sees them.
    plain = json.loads(json.dumps(content))
    return zlib.crc32(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


@dataclass(frozen=True, kw_only=True)
class Block:
    """A stretch of a bin file with a checksum of its own."""

    offset: int
    bytes: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows start..stop (exclusive) of a tensor, as one rank wrote them."""

    start: int
    stop: int
    file: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """A tensor of a checkpoint, as the ranks wrote it piece by piece."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    segments: tuple[Segment, ...]
    """In the order of rows, without gaps."""

    @property
    def num_rows(self) -> int:
        return count_rows(self.shape)

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape[1:]).numel()


def count_rows(shape: tuple[int, ...]) -> int:
    """Length of dim 0; a scalar has one row."""
    return shape[0] if shape else 1


def index_tensors(documents: Iterable[Mapping[str, Any]]) -> dict[str, SavedTensor]:
    """Where each row of each tensor lies, from the index files of all ranks.

    Raises: CheckpointError where ranks disagree on a shape or type, and for rows that none or two of them
    wrote.
    """
    found: dict[str, SavedTensor] = {}
    segments: dict[str, list[Segment]] = {}
    for document in documents:
        for piece in document["pieces"]:
            name, shape, dtype = piece["name"], tuple(piece["shape"]), DTYPES[piece["dtype"]]
            known = found.setdefault(name, SavedTensor(shape=shape, dtype=dtype, segments=()))
            if (known.shape, known.dtype) != (shape, dtype):
                raise CheckpointError(
                    f"all ranks must agree on {name}; {document['bin']} says {list(shape)} {dtype}, "
                    f"an earlier rank {list(known.shape)} {known.dtype}."
                )
            segments.setdefault(name, []).append(_segment(piece, document["bin"]))
    return {
        name: SavedTensor(
            shape=tensor.shape, dtype=tensor.dtype, segments=_in_order(name, tensor, segments[name])
        )
        for name, tensor in found.items()
    }


def _segment(piece: Mapping[str, Any], file: str) -> Segment:
    blocks = tuple(Block(**block) for block in piece["blocks"])
    return Segment(start=piece["start"], stop=piece["start"] + piece["rows"], file=file, blocks=blocks)


def _in_order(name: str, tensor: SavedTensor, segments: list[Segment]) -> tuple[Segment, ...]:
    filled = sorted((part for part in segments if part.stop > part.start), key=attrgetter("start"))
    reached = 0
    for part in filled:
        if part.start != reached:
            problem = "no rank wrote" if part.start > reached else "two ranks wrote"
            low, high = sorted((part.start, reached))
            raise CheckpointError(
                f"{problem} rows {low}..{high} of {name}; each row needs exactly one owner."
            )
        reached = part.stop
    if reached != tensor.num_rows:
        raise CheckpointError(
            f"no rank wrote rows {reached}..{tensor.num_rows} of {name}; each row needs exactly one owner."
        )
    return tuple(filled)
