"""From what features ask for to one lookup per table, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_streams.jagged import gather_ranges, moved
from models.tables import Ids, LookedUp, Lookup, Rows, TableSpec
from sharding.tables import EmbeddingTables


@dataclass(frozen=True, kw_only=True)
class MergedIds:
    """What several requests (micro-batches) ask for together, each row once; made on the host."""

    tables: Mapping[str, Tensor]
    """Table -> ids [U] without repetition."""
    positions: tuple[Mapping[str, Tensor], ...]
    """Per request: feature -> index [n] into the ids of its table."""

    def to(self, device: torch.device) -> "MergedIds":
        def move(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: moved(tensor, device) for name, tensor in tensors.items()}

        return MergedIds(tables=move(self.tables), positions=tuple(move(entry) for entry in self.positions))


def merge_ids(specs: Sequence[TableSpec], requests: Sequence[Ids]) -> MergedIds:
    """Join all features of all requests into one list of distinct ids per table."""
    positions: list[dict[str, Tensor]] = [{} for _ in requests]
    tables = {}
    for spec in specs:
        wanted = [
            (i, name, ids)
            for i, request in enumerate(requests)
            for name, ids in _asked(spec, specs, request, positions[i]).items()
        ]
        if not wanted:
            continue
        distinct, inverse = _unique(torch.cat([ids for _, _, ids in wanted]))
        tables[spec.name] = distinct
        for (i, name, _), part in zip(wanted, inverse.split([len(ids) for _, _, ids in wanted]), strict=True):
            positions[i][name] = part
    return MergedIds(tables=tables, positions=tuple(positions))


def _asked(
    spec: TableSpec, specs: Sequence[TableSpec], request: Ids, bags: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What a request asks a table for, by feature; of a table of attributes a bag of ids for each row it describes,
    whose borders are put into `bags`."""
    if spec.describes is None:
        return {name: request[name] for name in spec.features if name in request}
    values, offsets = spec.attributes.values.numpy(), spec.attributes.offsets.numpy()
    found = {}
    for name in _described(spec, specs):
        if name in request:
            # Of the rows that are asked for alone: a catalogue has many times as many.
            rows = request[name].numpy()
            starts, lengths = offsets[rows], offsets[rows + 1] - offsets[rows]
            found[_attributes(name)] = torch.from_numpy(values[gather_ranges(starts, lengths)])
            bags[_bags(name)] = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))))
    return found


def _described(spec: TableSpec, specs: Sequence[TableSpec]) -> tuple[str, ...]:
    """Features of the table that a table of attributes describes."""
    return next(other.features for other in specs if other.name == spec.describes)


def _attributes(feature: str) -> str:
    return f"{feature} attributes"


def _bags(feature: str) -> str:
    """Where the attributes of each id of a feature begin."""
    return f"{feature} bags"


def _unique(ids: Tensor) -> tuple[Tensor, Tensor]:
    # numpy sorts int64 with vector instructions, several times faster than torch.unique on a processor.
    distinct, inverse = np.unique(ids.numpy(), return_inverse=True)
    return torch.from_numpy(distinct), torch.from_numpy(inverse)


def rows_of_request(
    specs: Sequence[TableSpec],
    leaves: Mapping[str, Tensor],
    ids: Ids,
    positions: Mapping[str, Tensor],
    item_features: Mapping[str, Tensor],
) -> Rows:
    """The rows of one request, taken from the distinct rows of its tables; gradients add up in the leaves.

    Features of no table come back as they were asked for, with rows of width 0.
    """
    known = {name for spec in specs for name in spec.features}
    found = {
        name: LookedUp(ids=values, rows=torch.empty(len(values), 0, device=values.device))
        for name, values in ids.items()
        if name not in known
    }
    for spec in sorted(specs, key=lambda spec: spec.describes is not None):
        if spec.describes is not None:
            for name in _described(spec, specs):
                if name in found and _attributes(name) in positions:
                    found[name] = _with_attributes(found[name], leaves[spec.name], positions, name)
            continue
        names = [name for name in spec.features if name in positions]
        if not names:
            continue
        taken = _TakeRows.apply(leaves[spec.name], *(positions[name] for name in names))
        for name, rows in zip(names, taken, strict=True):
            found[name] = LookedUp(ids=ids[name], rows=rows, item_features=item_features.get(name))
    return found


def _with_attributes(found: LookedUp, leaf: Tensor, positions: Mapping[str, Tensor], name: str) -> LookedUp:
    """The rows, each with the sum of the rows of its attributes."""
    added = F.embedding_bag(
        positions[_attributes(name)], leaf, positions[_bags(name)], mode="sum", include_last_offset=True
    )
    return replace(found, rows=found.rows + added)


class _TakeRows(torch.autograd.Function):
    """Rows [n, D] of a leaf [U, D] for each of several positions [n].

    The gradients of all of them are added up in one buffer; a lookup of its own for each feature would make and
    add a gradient of the whole leaf for each.
    """

    @staticmethod
    def forward(ctx, leaf: Tensor, *positions: Tensor) -> tuple[Tensor, ...]:
        ctx.num_rows = leaf.shape[0]
        ctx.save_for_backward(*positions)
        return tuple(leaf.index_select(0, position) for position in positions)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total = gradients[0].new_zeros(ctx.num_rows, gradients[0].shape[1])
        for position, gradient in zip(ctx.saved_tensors, gradients, strict=True):
            total.index_add_(0, position, gradient)
        return total, *(None for _ in gradients)


class ItemFeatures:
    """Frozen feature vectors of items, memory-mapped: gathered on the host, never sharded or trained.

    Shapes: vectors [N, E] float16 or float32, row i of item row i.
    """

    def __init__(self, vectors: np.ndarray):
        self.vectors = vectors

    @property
    def dim(self) -> int:
        return self.vectors.shape[1]

    def gather(self, ids: Tensor) -> Tensor:
        """Shapes: [n] on the host -> [n, E] fp32."""
        return torch.from_numpy(self.vectors[ids.numpy()]).float()


def features_of_request(
    item_features: ItemFeatures | None, specs: Sequence[TableSpec], ids: Ids
) -> dict[str, Tensor]:
    """The vectors of all ids that are items; ids of other tables have none."""
    if item_features is None:
        return {}
    names = [name for spec in specs if spec.rows_are_items for name in spec.features if name in ids]
    return {name: item_features.gather(ids[name]) for name in names}


def make_lookup(
    specs: Sequence[TableSpec],
    tables: EmbeddingTables,
    item_features: ItemFeatures | None,
    device: torch.device,
) -> Lookup:
    """A lookup outside of training steps: ids on the host go in, rows without gradient come out."""

    def lookup(ids: Ids) -> Rows:
        merged = merge_ids(specs, [ids])
        features = features_of_request(item_features, specs, ids)
        moved = merged.to(device)
        with torch.no_grad():
            leaves = tables.lookup(moved.tables)
            return rows_of_request(
                specs,
                leaves,
                {name: values.to(device) for name, values in ids.items()},
                moved.positions[0],
                {name: values.to(device) for name, values in features.items()},
            )

    return lookup
