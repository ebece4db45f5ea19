"""Huge embedding tables as data: a model declares them, `sharding` owns their rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from data_streams.jagged import Jagged

UNBOUNDED = 2**62
"""Rows of a vocabulary that nobody has counted."""


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """One table with a row per item, user or other huge vocabulary."""

    name: str
    num_rows: int
    dim: int
    features: tuple[str, ...]
    """Names under which a step asks for rows of this table."""
    init_scale: float = 0.02
    """Standard deviation of the initial rows, drawn from (seed, table, row)."""
    placement: Literal["auto", "row_wise", "table_wise"] = "auto"
    """How rows are spread over workers; `auto` leaves it to the planner."""
    rows_are_items: bool = True
    """Whether row i belongs to item i, so that another run's rows can be matched by the items' raw ids."""
    rows_are_places: bool = False
    """Whether row i belongs to a place of a tree, whichever items lie below it, so that a run over another tree of the
    same shape can start from these rows."""
    rows_are_users: bool = False
    """Whether row i belongs to user i."""
    hash_rows: int | None = None
    """Rows really kept, for an unbounded vocabulary: each id is hashed twice into them and the two are summed."""
    describes: str | None = None
    """Table whose rows those of this one are added to, by `attributes`; nobody asks for them."""
    attributes: Jagged | None = field(default=None, repr=False, compare=False)
    """Ids of this table for each row of the one it describes, on the host."""


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """What is known of items or users in columns: a jagged row of ids for each of them, of an unbounded vocabulary."""

    ids: Jagged
    """On the host."""
    hash_rows: int
    """Rows of the table of their vectors."""

    def table(self, described: TableSpec) -> TableSpec:
        """The table whose rows are added to those of items or users."""
        return TableSpec(
            name=f"{described.name}_attributes",
            num_rows=UNBOUNDED,
            hash_rows=self.hash_rows,
            dim=described.dim,
            features=(),
            init_scale=described.init_scale,
            placement="row_wise",
            rows_are_items=False,
            describes=described.name,
            attributes=self.ids,
        )


# Two independent multiply-shift hashes over 62 bits; odd constants, fixed for ever since tables depend on them.
_HASH_MULTIPLIERS = (0x1E3779B97F4A7C15, 0x2545F4914F6CDD1D)
_HASH_OFFSETS = (0x0123456789ABCDE1, 0x1FEDCBA987654321)
NUM_HASHES = len(_HASH_MULTIPLIERS)


def hash_ids(ids: Tensor, num_rows: int, number: int = 0) -> Tensor:
    """A row for each id of an unbounded vocabulary, by one of the hashes; the same on every machine.

    Shapes: [n] int64 -> [n] int64 in 0..num_rows-1.
    """
    multiplier, offset = _HASH_MULTIPLIERS[number], _HASH_OFFSETS[number]
    mixed = ids * multiplier + offset
    mixed = (mixed ^ (mixed >> 31)) * multiplier
    return ((mixed >> 20) & ((1 << 43) - 1)) % num_rows


Ids = Mapping[str, Tensor]
"""Feature name -> ids [n] int64."""


@dataclass(frozen=True, kw_only=True)
class LookedUp:
    """The rows of one feature, as the dense part of a model sees them.

    Shapes: n ids.
    """

    ids: Tensor
    """[n] int64, as the model asked for them."""
    rows: Tensor
    """[n, dim], in the order of the ids; of width 0 where no table has the feature, which then only brings its ids."""
    item_features: Tensor | None = None
    """[n, E], frozen feature vectors of the items, where the model uses them."""


Rows = Mapping[str, LookedUp]
"""Feature name -> what was looked up."""

Lookup = Callable[[Ids], Rows]
"""Looks rows up outside of a training step (decoding, evaluation); a collective call on all workers."""


def carried(name: str, rows: Jagged) -> Ids:
    """Rows of numbers as ids that no table has: so what the host lays out for a step travels with its lookup."""
    return {
        name: rows.values,
        f"{name} lengths": rows.lengths,
        # Its shape tells the length of the longest row, on the host, on every device.
        f"{name} longest": torch.zeros(rows.max_length, dtype=torch.int64),
    }


def carried_back(name: str, rows: Rows) -> Jagged:
    """The way back from `carried`, wherever the rows lie."""
    longest = rows[f"{name} longest"].ids.shape[0]
    return Jagged.on_device(rows[name].ids, rows[f"{name} lengths"].ids, longest)
