"""What the learner asks of embedding tables, wherever their rows lie."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cluster.seeds import purpose_seed
from models.tables import NUM_HASHES, TableSpec, hash_ids
from sharding.state import Piece

ADAGRAD_EPSILON = 1e-8
_INIT_BLOCK_ROWS = 1024
_SUMMED_ROWS = 16_384


class EmbeddingTables(ABC):
    """Rows of all tables of a model with their optimizer, row-wise Adagrad.

    A training step calls `lookup` once and `update` once; two of either in a step would step the optimizer twice.
    """

    def __init__(self, specs: Sequence[TableSpec]):
        self.specs = {spec.name: spec for spec in specs}

    @abstractmethod
    def lookup(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of every table, a collective call. Shapes: ids [n] int64 per table -> [n, dim] per table."""

    @abstractmethod
    def update(
        self, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> None:
        """Give the gradients of looked-up rows back; each row that was looked up takes one optimizer step."""

    @abstractmethod
    def set_learning_rate(self, rate: float) -> None:
        """The rate of the next update; to be set before its lookup, since the fused optimizer reads it there."""

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """Live rows `table/NAME` [rows, dim] and optimizer state `table_state/NAME` [rows] of this rank."""

    def checksums(self) -> dict[str, float]:
        """Sum of this rank's rows per piece, to notice anything that overwrites them."""
        return {f"{piece.name}[{piece.start}]": _sum(piece.tensor) for piece in self.pieces()}

    def initialise(self, seed: int) -> None:
        """Draw every row from (seed, table, row), so that every sharding starts with the same table."""
        for piece in self.pieces():
            kind, name = piece.name.split("/", 1)
            if kind == "table":
                fill_initial_rows(piece.tensor, self.specs[name], piece.start, seed)


class NoTables(EmbeddingTables):
    """For a model without any huge table."""

    placements = ()

    def __init__(self) -> None:
        super().__init__([])

    def lookup(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def update(
        self, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> None:
        """Nothing to give back."""

    def set_learning_rate(self, rate: float) -> None:
        """Nothing learns."""

    def pieces(self) -> list[Piece]:
        return []


def kept_rows(spec: TableSpec) -> int:
    """Rows a table really has, which is fewer than its vocabulary where ids are hashed."""
    return spec.hash_rows or spec.num_rows


def _sum(rows: Tensor) -> float:
    # Of a part of the rows at a time: torch copies what it adds up in fp64, and tables may fill more than a third of a
    # device.
    return sum(part.sum(dtype=torch.float64) for part in rows.split(_SUMMED_ROWS)).item()


def fill_initial_rows(rows: Tensor, spec: TableSpec, start: int, seed: int) -> None:
    """Fill rows start, start + 1, ... of a table in place. Shapes: rows [n, dim]."""
    stop = start + rows.shape[0]
    for block in range(start // _INIT_BLOCK_ROWS, -(-stop // _INIT_BLOCK_ROWS)):
        first = block * _INIT_BLOCK_ROWS
        generator = torch.Generator().manual_seed(purpose_seed(seed, "table", spec.name, block))
        drawn = torch.randn(_INIT_BLOCK_ROWS, spec.dim, generator=generator) * spec.init_scale
        low, high = max(start, first), min(stop, first + _INIT_BLOCK_ROWS)
        rows[low - start : high - start].copy_(drawn[low - first : high - first])


def hash_twice(ids: Tensor, num_rows: int) -> Tensor:
    """Two rows for each id of an unbounded vocabulary; the same on every machine and at every sharding.

    Shapes: [n] int64 -> [2 n] int64 in 0..num_rows-1, the first hashes before the second ones.
    """
    return torch.cat([hash_ids(ids, num_rows, number) for number in range(NUM_HASHES)])


def physical_ids(spec: TableSpec, ids: Tensor) -> Tensor:
    """Rows really kept behind ids. Shapes: [n] -> [n], or [2 n] where the table is hashed."""
    return hash_twice(ids, spec.hash_rows) if spec.hash_rows else ids


def logical_rows(spec: TableSpec, rows: Tensor) -> Tensor:
    """One vector per id from its physical rows. Shapes: [n, dim] or [2 n, dim] -> [n, dim]."""
    return rows.view(2, -1, rows.shape[-1]).sum(0) if spec.hash_rows else rows
