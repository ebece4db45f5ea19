"""Which rank holds which rows: asked of TorchRec's planner, under the constraints of the tables and the run."""

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import _remote_device
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ShardingPlan, ShardingType

from cluster.errors import PlanError
from cluster.process import Process
from cluster.topology import usable_memory_bytes
from models.tables import TableSpec
from sharding.collectives import exchange_integers
from sharding.configuration import ShardingConfig
from sharding.placements import TablePlacement
from sharding.tables import kept_rows

logger = logging.getLogger(__name__)

_KINDS = {"row_wise": ShardingType.ROW_WISE.value, "table_wise": ShardingType.TABLE_WISE.value}
_GIB = 2**30
_DIM_UNIT = 4
"""Of the kernels of fbgemm."""


def collections(specs: Sequence[TableSpec]) -> dict[str, EmbeddingCollection]:
    """TorchRec modules on the meta device; tables of one collection share their dimension.

    Raises: PlanError for a dimension that its kernels do not know.
    """
    by_dim: dict[int, list[TableSpec]] = {}
    for spec in specs:
        if spec.dim % _DIM_UNIT:
            raise PlanError(
                f"the rows of a table must have a multiple of {_DIM_UNIT} numbers, and those of {spec.name} have "
                f"{spec.dim}; give the model such a width"
            )
        by_dim.setdefault(spec.dim, []).append(spec)
    return {
        f"dim{dim}": EmbeddingCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingConfig(
                    name=spec.name,
                    embedding_dim=dim,
                    num_embeddings=kept_rows(spec),
                    feature_names=[spec.name],
                )
                for spec in group
            ],
        )
        for dim, group in by_dim.items()
    }


def make_plan(
    module: torch.nn.Module,
    specs: Sequence[TableSpec],
    sharder: EmbeddingCollectionSharder,
    config: ShardingConfig,
    process: Process,
) -> ShardingPlan:
    """Ask the planner; all ranks get the same plan. A collective call.

    Raises: PlanError if a placement names no table, or if the tables do not fit.
    """
    unknown = sorted(set(config.placement) - {spec.name for spec in specs})
    if unknown:
        raise PlanError(
            f"sharding.placement names {', '.join(unknown)}, and the model has the tables "
            f"{', '.join(spec.name for spec in specs)}; use one of these names"
        )
    memory_bytes = _memory_bytes(config, process)
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=process.world_size,
            compute_device=process.device.type,
            **{"ddr_cap" if process.device.type == "cpu" else "hbm_cap": memory_bytes},
        ),
        constraints={spec.name: _constraint(spec, config) for spec in specs},
    )
    try:
        plan = planner.collective_plan(module, [sharder], dist.group.WORLD)
    except PlannerError as error:
        needed = sum(kept_rows(spec) * spec.dim * 4 for spec in specs) / _GIB
        raise PlanError(
            f"{len(specs)} tables of {needed:.2f} GiB do not fit on {process.world_size} workers as asked, each of "
            f"{memory_bytes / _GIB:.2f} GiB (sharding.hbm-gib-per-worker): {error}; use more workers, row_wise "
            "placement, or fewer rows (hash_rows)"
        ) from error
    if process.device.type == "cuda":
        _name_devices(plan, process)
    return plan


def _memory_bytes(config: ShardingConfig, process: Process) -> int:
    """What the planner may count on per worker: the least that any of them has, unless it was given."""
    if config.hbm_gib_per_worker is not None:
        return int(config.hbm_gib_per_worker * _GIB)
    if process.device.type == "cuda":
        own = torch.cuda.get_device_properties(process.device).total_memory
    else:
        own = usable_memory_bytes() // process.local_world_size
    return min(found for (found,) in exchange_integers([own], process))


def _name_devices(plan: ShardingPlan, process: Process) -> None:
    """Say on which accelerator of its machine each shard lies; a collective call.

    The planner of TorchRec 1.8 counts accelerators by rank, as if all machines had as many workers, and a shard that
    names another one than its rows lie on is refused.
    """
    devices = exchange_integers([process.device.index], process)
    for module_plan in plan.plan.values():
        for parameter in module_plan.values():
            for shard in parameter.sharding_spec.shards:
                rank = shard.placement.rank()
                shard.placement = _remote_device(f"rank:{rank}/cuda:{devices[rank][0]}")


def _constraint(spec: TableSpec, config: ShardingConfig) -> ParameterConstraints:
    placement = config.placement.get(spec.name, spec.placement)
    kinds = list(_KINDS.values()) if placement == "auto" else [_KINDS[placement]]
    return ParameterConstraints(sharding_types=kinds, compute_kernels=[EmbeddingComputeKernel.FUSED.value])


def placements(plan: ShardingPlan, specs: Sequence[TableSpec]) -> list[TablePlacement]:
    """The plan as plain data."""
    kinds = {value: name for name, value in _KINDS.items()}
    by_name = {spec.name: spec for spec in specs}
    found = []
    for module_plan in plan.plan.values():
        for name, parameter in module_plan.items():
            rows: dict[int, int] = {}
            for shard in parameter.sharding_spec.shards:
                rank = shard.placement.rank()
                rows[rank] = rows.get(rank, 0) + shard.shard_sizes[0]
            spec = by_name[name]
            found.append(
                TablePlacement(
                    name=name,
                    num_rows=kept_rows(spec),
                    dim=spec.dim,
                    kind=kinds[parameter.sharding_type],
                    rows_per_rank=rows,
                )
            )
    return found
