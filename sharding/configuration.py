"""How tables are spread over the workers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Where tables and experts go."""

    placement: Mapping[str, Literal["auto", "row_wise", "table_wise"]] = field(default_factory=dict)
    """Placement by table name, overriding what the model asks for."""
    hbm_gib_per_worker: float | None = None
    """Memory the planner may count on per worker, in GiB; None takes what there is: all of an accelerator, or this
    worker's share of its machine's memory."""
    expert_parallel: int = 1
    """Workers that hold the experts of a layer together, each a part of them; must divide workers and experts."""

    @property
    def workers_multiple_of(self) -> int:
        """An elastic run may go on with this many workers, or with a multiple of it."""
        return self.expert_parallel
