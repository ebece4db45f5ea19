"""What every tokenizer is: it turns item vectors into paths of codes, and paths back into vectors.

All of them share one geometry. A vector is projected to a point (for k-means the point is the vector itself, for
an autoencoder it is the latent); each level has one vector per code, and a path stands for the sum of its code
vectors. Encoding goes down the levels: the nearest code vector is chosen and subtracted.

Shapes: N items, D input width, d width of points, L levels, K_l codes of level l.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from cluster.errors import ConfigError, DataError
from cluster.plugins import plugin_config
from cluster.storage import Storage
from models.tokenizers.clustering import nearest

TOKENIZERS = "models.tokenizers"
CONFIG_NAME = "tokenizer.json"
STATE_NAME = "tokenizer.safetensors"
BLOCK_ROWS = 65_536


@runtime_checkable
class Matrix(Protocol):
    """Vectors that may lie on disk: a NumPy array, a memory map or anything that reads rows when asked."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class Codebooks:
    """Options of all tokenizers that keep a list of vectors per level."""

    code_sizes: tuple[int, ...] = (256, 256, 256)
    """Codes of each level; their number is the length of a path."""
    seed: int = 0
    """Seed of all random draws."""

    def __post_init__(self):
        if not self.code_sizes or min(self.code_sizes) < 1:
            raise ConfigError(f"--code-sizes must be one or more positive numbers, got {self.code_sizes}")


def require_at_least(config: Any, **least: int) -> None:
    """Raises: ConfigError for an option, a number or several, below the least it may be."""
    for name, bound in least.items():
        value = getattr(config, name)
        if min(value if isinstance(value, tuple) else (value,), default=bound) < bound:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {bound}, got {value}")


class Tokenizer(ABC):
    """Built by its `Config.build(dim=D)`; `fit` makes `code_vectors`, after which all else works."""

    config: Any
    code_vectors: list[np.ndarray]
    """For each level [K_l, d] float32."""

    def __init__(self, config: Any, dim: int):
        self.config, self.dim, self.code_vectors = config, dim, []

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return tuple(len(vectors) for vectors in self.code_vectors)

    @abstractmethod
    def fit(self, vectors: Matrix) -> None:
        """Learn from the vectors of a catalogue, reading them in blocks."""

    def project(self, vectors: np.ndarray) -> np.ndarray:
        """Where codes are chosen. Shapes: [n, D] -> [n, d] float32."""
        return np.asarray(vectors, dtype=np.float32)

    def unproject(self, points: np.ndarray) -> np.ndarray:
        """Shapes: [n, d] -> [n, D] float32."""
        return points

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes of a block of vectors, each by itself. Shapes: [n, D] -> [n, L] int32."""
        return greedy_codes(self.project(vectors), self.code_vectors)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """What codes stand for; codes beyond the L levels are left out. Shapes: [n, L] -> [n, D] float32."""
        return self.unproject(path_points(codes, self.code_vectors))

    def assign(self, vectors: Matrix) -> np.ndarray:
        """Codes of a whole catalogue, read in blocks. Shapes: [N, D] -> [N, L] int32."""
        return np.concatenate([self.encode(block) for _, block in blocks(vectors)])

    def arrays(self) -> dict[str, np.ndarray]:
        """What was learnt, besides the code vectors."""
        return {}

    def set_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Take back what `arrays` gave; called once, on a tokenizer that was not fitted."""
        if arrays:
            raise DataError(f"{type(self).__name__} has nothing named {', '.join(sorted(arrays))}")


def blocks(vectors: Matrix, rows: int = BLOCK_ROWS) -> Iterator[tuple[int, np.ndarray]]:
    """First row and float32 vectors of each block.

    Raises: DataError naming the rows that are not finite.
    """
    for start in range(0, vectors.shape[0], rows):
        block = np.asarray(vectors[start : start + rows], dtype=np.float32)
        require_finite(block, start + np.arange(len(block)))
        yield start, block


def take_sample(vectors: Matrix, count: int, seed: int) -> np.ndarray:
    """At most `count` different rows, in their order, as float32. Shapes: [N, D] -> [n, D]."""
    num_rows = vectors.shape[0]
    rows = np.arange(num_rows)
    if count < num_rows:
        rows = np.sort(np.random.default_rng(seed).choice(num_rows, count, replace=False))
    sample = np.asarray(vectors[rows], dtype=np.float32)
    require_finite(sample, rows)
    return sample


def require_finite(vectors: np.ndarray, rows: np.ndarray) -> None:
    """Shapes: vectors [n, D], rows [n]: where they come from."""
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        shown = ", ".join(map(str, rows[bad][:3]))
        raise DataError(
            f"item vectors must be finite numbers; {int(bad.sum())} of the {len(rows)} that were looked at are "
            f"not, such as row {shown}; mend the matrix"
        )


def greedy_codes(points: np.ndarray, code_vectors: list[np.ndarray]) -> np.ndarray:
    """At each level the code nearest to what the levels before left. Shapes: [n, d] -> [n, L] int32."""
    codes = np.empty((len(points), len(code_vectors)), dtype=np.int32)
    residual = np.array(points, dtype=np.float32)
    for level, vectors in enumerate(code_vectors):
        codes[:, level] = nearest(residual, vectors)
        residual -= vectors[codes[:, level]]
    return codes


def path_points(codes: np.ndarray, code_vectors: list[np.ndarray]) -> np.ndarray:
    """The sum of the code vectors of the first levels of `codes`. Shapes: [n, l] -> [n, d] float32."""
    points = np.zeros((len(codes), code_vectors[0].shape[1]), dtype=np.float32)
    for level, vectors in enumerate(code_vectors[: codes.shape[1]]):
        points += vectors[codes[:, level]]
    return points


class Points:
    """The points of a matrix of vectors, projected when they are read."""

    def __init__(self, tokenizer: Tokenizer, vectors: Matrix):
        self.tokenizer, self.vectors = tokenizer, vectors
        self.shape = (vectors.shape[0], tokenizer.code_vectors[0].shape[1])

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return self.tokenizer.project(self.vectors[rows])


def reconstruction_error(
    decode: Callable[[np.ndarray], np.ndarray], vectors: Matrix, codes: np.ndarray
) -> float:
    """Squared distance to what the codes stand for, over that to the mean vector: 0 is perfect, 1 says nothing.

    Shapes: vectors [N, D], codes [N, L or more].
    """
    total, squares, lost = np.zeros(vectors.shape[1]), 0.0, 0.0
    for start, block in blocks(vectors):
        decoded = decode(codes[start : start + len(block)])
        lost += float(np.square(block - decoded, dtype=np.float64).sum())
        total += block.sum(axis=0, dtype=np.float64)
        squares += float(np.square(block, dtype=np.float64).sum())
    spread = squares - float(np.square(total).sum()) / vectors.shape[0]
    return lost / spread if spread > 0 else 0.0


def save_tokenizer(tokenizer: Tokenizer, storage: Storage) -> None:
    """Write options and what was learnt, so that new items can be encoded later."""
    levels = {f"code_vectors.{level}": vectors for level, vectors in enumerate(tokenizer.code_vectors)}
    storage.write(STATE_NAME, save_arrays({**tokenizer.arrays(), **levels}))
    storage.write(CONFIG_NAME, json.dumps(describe(tokenizer), indent=1).encode())


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    name = type(tokenizer).__module__.rsplit(".", 1)[-1].replace("_", "-")
    return {"name": name, "dim": tokenizer.dim, "config": asdict(tokenizer.config)}


def load_tokenizer(storage: Storage) -> Tokenizer:
    """Raises: DataError where a tokenizer is missing or damaged."""
    try:
        described = json.loads(storage.read(CONFIG_NAME))
        arrays = load_arrays(storage.read(STATE_NAME))
        options = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in described["config"].items()
        }
        tokenizer = plugin_config(TOKENIZERS, described["name"])(**options).build(dim=described["dim"])
        levels = sorted(name for name in arrays if name.startswith("code_vectors."))
        tokenizer.code_vectors = [arrays.pop(f"code_vectors.{level}") for level in range(len(levels))]
        tokenizer.set_arrays(arrays)
    except FileNotFoundError as error:
        raise DataError(
            f"{storage.root} must hold a tokenizer ({CONFIG_NAME}, {STATE_NAME}), and {error} is missing; an "
            "imported table has none; make a table with `grail tokenize`"
        ) from error
    except Exception as error:
        raise DataError(
            f"the tokenizer in {storage.root} cannot be read: {error}; copy the folder again"
        ) from error
    return tokenizer
