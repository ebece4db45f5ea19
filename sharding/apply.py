"""Tables spread over the workers by TorchRec, with the fused row-wise Adagrad of FBGEMM."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed import comm_ops
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv

from cluster.process import Process
from data_streams.jagged import moved
from models.tables import TableSpec
from sharding.configuration import ShardingConfig
from sharding.placements import TablePlacement
from sharding.plan import collections, make_plan, placements
from sharding.state import Piece
from sharding.tables import ADAGRAD_EPSILON, EmbeddingTables, NoTables, logical_rows, physical_ids

LOOKUP_ROWS = {"cpu": 1, "cuda": 1024}
"""Jagged rows that the ids of a table are cut into, equal on all ranks. The kernels of fbgemm 1.8 on CUDA give each row
to one thread (where ids are sorted by the rank that has them) or one warp (where vectors are read), however long."""


class _Collections(nn.Module):
    """One EmbeddingCollection per embedding dimension, so that one plan covers all tables."""

    def __init__(self, specs: Sequence[TableSpec]):
        super().__init__()
        self.by_dim = nn.ModuleDict(collections(specs))

    def forward(self, features: Mapping[str, KeyedJaggedTensor]) -> dict[str, Tensor]:
        found = {}
        for name, collection in self.by_dim.items():
            if name in features:
                found.update({key: rows.values() for key, rows in collection(features[name]).items()})
        return found


class ShardedTables(EmbeddingTables):
    """The lookup is an all-to-all of ids and one of rows; the update sends the gradients back the same way.

    TorchRec divides sparse gradients by the number of workers (as DeepSpeed does with dense ones), so a rank's
    loss is its sum * workers / global count.
    """

    def __init__(
        self,
        specs: Sequence[TableSpec],
        *,
        process: Process,
        config: ShardingConfig,
        seed: int,
        learning_rate: float,
    ):
        super().__init__(specs)
        comm_ops.set_gradient_division(True)
        fused = {
            "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "learning_rate": learning_rate,
            "eps": ADAGRAD_EPSILON,
        }
        sharder = EmbeddingCollectionSharder(fused_params=fused)
        module = _Collections(specs)
        plan = make_plan(module, specs, sharder, config, process)
        self.placements: list[TablePlacement] = placements(plan, specs)
        self.device = process.device
        self.module = DistributedModelParallel(
            module,
            device=process.device,
            plan=plan,
            sharders=[sharder],
            env=ShardingEnv.from_process_group(dist.group.WORLD),
        )
        self.initialise(seed)

    def lookup(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        nothing = torch.zeros(0, dtype=torch.int64, device=self.device)
        features = {}
        for dim in {self.specs[name].dim for name in ids}:
            # TorchRec fixes the order of the tables at its first call, so none may be left out of a later one.
            specs = [spec for spec in self.specs.values() if spec.dim == dim]
            values = [physical_ids(spec, ids.get(spec.name, nothing)) for spec in specs]
            features[f"dim{dim}"] = _keyed(specs, values, self.device)
        rows = self.module(features)
        return {name: logical_rows(self.specs[name], rows[name]) for name in ids}

    def update(
        self, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> None:
        names = list(gradients)
        torch.autograd.backward([rows[name] for name in names], [gradients[name] for name in names])

    def set_learning_rate(self, rate: float) -> None:
        for group in self.module.fused_optimizer.param_groups:
            group["lr"] = rate
        # The fused optimizer steps inside backward; its own step only hands the rate down.
        self.module.fused_optimizer.step()

    def pieces(self) -> list[Piece]:
        found = []
        for key, tensor in self.module.state_dict().items():
            found += _local_pieces(f"table/{_table_of(key)}", tensor)
        for key, states in self.module.fused_optimizer.state_dict()["state"].items():
            for tensor in states.values():
                found += _local_pieces(f"table_state/{_table_of(key)}", tensor)
        return found


def spread_tables(
    specs: Sequence[TableSpec], *, process: Process, config: ShardingConfig, seed: int, learning_rate: float
) -> EmbeddingTables:
    """The tables of a model over all workers; a collective call."""
    if not specs:
        return NoTables()
    return ShardedTables(specs, process=process, config=config, seed=seed, learning_rate=learning_rate)


def _keyed(specs: list[TableSpec], values: list[Tensor], device: torch.device) -> KeyedJaggedTensor:
    """All ids of a step as one keyed tensor; where a row of it begins says nothing."""
    num_rows = LOOKUP_ROWS[device.type]
    lengths = torch.cat([_row_lengths(value.shape[0], num_rows) for value in values])
    return KeyedJaggedTensor(
        keys=[spec.name for spec in specs], values=torch.cat(values), lengths=moved(lengths, device)
    )


def _row_lengths(count: int, num_rows: int) -> Tensor:
    """As equal as they can be. Example: 7 ids in 3 rows -> 3, 2, 2."""
    lengths = torch.full((num_rows,), count // num_rows)
    lengths[: count % num_rows] += 1
    return lengths


def _table_of(key: str) -> str:
    """`module.by_dim.dim64.embeddings.item.weight` -> `item`."""
    return key.removesuffix(".weight").rsplit(".", 1)[-1]


def _local_pieces(name: str, tensor: ShardedTensor) -> list[Piece]:
    shape = tuple(tensor.metadata().size)
    return [
        Piece(
            name=name, start=shard.metadata.shard_offsets[0], global_shape=shape, tensor=shard.tensor.detach()
        )
        for shard in tensor.local_shards()
    ]
