"""Huge embedding tables as data: a model declares them, `sharding` owns their rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


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
    hash_rows: int | None = None
    """Rows really kept, for an unbounded vocabulary: each id is hashed twice into them and the two are summed."""


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
    """[n, dim], in the order of the ids."""
    item_features: Tensor | None = None
    """[n, E], frozen feature vectors of the items, where the model uses them."""


Rows = Mapping[str, LookedUp]
"""Feature name -> what was looked up."""

Lookup = Callable[[Ids], Rows]
"""Looks rows up outside of a training step (decoding, evaluation); a collective call on all workers."""
