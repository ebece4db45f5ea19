"""The peer of the sparse step: TorchRec's DistributedModelParallel as its documentation uses it."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingEnv, ShardingType

from cluster.process import Process
from models.tables import TableSpec
from sharding.tables import ADAGRAD_EPSILON


class BareTable:
    """One row-wise table with fused row-wise Adagrad; every feature is looked up as it is, repetitions included."""

    def __init__(self, spec: TableSpec, process: Process, learning_rate: float):
        self.spec = spec
        sharder = EmbeddingCollectionSharder(
            fused_params={
                "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
                "learning_rate": learning_rate,
                "eps": ADAGRAD_EPSILON,
            }
        )
        table = EmbeddingConfig(
            name=spec.name,
            embedding_dim=spec.dim,
            num_embeddings=spec.num_rows,
            feature_names=list(spec.features),
        )
        collection = EmbeddingCollection(device=torch.device("meta"), tables=[table])
        constraint = ParameterConstraints(
            sharding_types=[ShardingType.ROW_WISE.value], compute_kernels=[EmbeddingComputeKernel.FUSED.value]
        )
        planner = EmbeddingShardingPlanner(
            topology=Topology(
                world_size=process.world_size,
                compute_device=process.device.type,
                local_world_size=process.world_size,
            ),
            constraints={spec.name: constraint},
        )
        self.module = DistributedModelParallel(
            collection,
            device=process.device,
            plan=planner.collective_plan(collection, [sharder], dist.group.WORLD),
            sharders=[sharder],
            env=ShardingEnv.from_process_group(dist.group.WORLD),
        )

    def own_rows(self) -> Tensor:
        """This rank's rows, live."""
        (weight,) = self.module.state_dict().values()
        return weight.local_shards()[0].tensor

    def step(self, ids: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Look up, and send the gradients of the rows straight back through the lookup."""
        names = self.spec.features
        features = KeyedJaggedTensor(
            keys=list(names),
            values=torch.cat([ids[name] for name in names]),
            lengths=torch.tensor([ids[name].shape[0] for name in names]),
        )
        rows = {name: found.values() for name, found in self.module(features).items()}
        torch.autograd.backward([rows[name] for name in names], [gradients[name] for name in names])
