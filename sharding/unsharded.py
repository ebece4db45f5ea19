"""All tables on one process with plain torch: for notebooks, for machines without TorchRec, as the reference."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.tables import TableSpec
from sharding.placements import TablePlacement
from sharding.state import Piece
from sharding.tables import ADAGRAD_EPSILON, EmbeddingTables, kept_rows, logical_rows, physical_ids


class UnshardedTables(EmbeddingTables):
    """Row-wise Adagrad written out: s_r += mean(g_r^2), w_r -= rate * g_r / (sqrt(s_r) + epsilon)."""

    def __init__(self, specs: Sequence[TableSpec], *, seed: int, learning_rate: float, device: torch.device):
        super().__init__(specs)
        self.learning_rate = learning_rate
        self.rows = {s.name: torch.empty(kept_rows(s), s.dim, device=device) for s in specs}
        self.state = {s.name: torch.zeros(kept_rows(s), device=device) for s in specs}
        self.placements = [
            TablePlacement(
                name=s.name, num_rows=kept_rows(s), dim=s.dim, kind="whole", rows_per_rank={0: kept_rows(s)}
            )
            for s in specs
        ]
        self.initialise(seed)

    def lookup(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, wanted in ids.items():
            spec = self.specs[name]
            found[name] = logical_rows(spec, self.rows[name].index_select(0, physical_ids(spec, wanted)))
        return found

    def update(
        self, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> None:
        for name, gradient in gradients.items():
            spec = self.specs[name]
            touched, position = physical_ids(spec, ids[name]).unique(return_inverse=True)
            summed = torch.zeros(touched.shape[0], spec.dim, device=gradient.device)
            summed.index_add_(0, position, gradient.repeat(2, 1) if spec.hash_rows else gradient)
            state = self.state[name]
            state[touched] += summed.square().mean(1)
            step = self.learning_rate * summed / (state[touched].sqrt() + ADAGRAD_EPSILON)[:, None]
            self.rows[name][touched] -= step

    def set_learning_rate(self, rate: float) -> None:
        self.learning_rate = rate

    def pieces(self) -> list[Piece]:
        tables = [(f"table/{name}", tensor) for name, tensor in self.rows.items()]
        states = [(f"table_state/{name}", tensor) for name, tensor in self.state.items()]
        return [
            Piece(name=name, start=0, global_shape=tuple(tensor.shape), tensor=tensor)
            for name, tensor in (*tables, *states)
        ]
