"""Lookup and update of the item table: distinct rows behind a detached border against bare TorchRec."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers.bare_torchrec import BareTable
from benchmarks.setting.benchmark import Bar, Benchmark, Request, compare_times
from benchmarks.setting.recipe import first_batches, recipe_config, train_stream
from benchmarks.setting.timing import interleave
from cluster.process import Process
from models.recommender import StepContext
from models.sasrec import SASRec
from models.tables import Ids
from sharding.apply import ShardedTables
from sharding.lookup import merge_ids, rows_of_request
from trainer.configuration import PretrainConfig

BENCHMARK = Benchmark(
    unit="s per step",
    bars=(Bar(key="ratio", at_most=1.10), Bar(key="largest_difference", at_most=1e-4)),
    world_size=2,
    threads_per_rank=1,
)
ROUNDS = {"full": 15, "small": 2}
STEPS = {"full": 40, "small": 2}


def measure(process: Process, request: Request) -> dict[str, Any]:
    """One round takes some steps of the recipe's ids; both tables start equal and must end equal."""
    config = recipe_config(request.data)
    stream = train_stream(process, config)
    model = _make_model(config, stream.manifest.num_items)
    (spec,) = model.tables()
    rate = config.train.table_learning_rate
    ours = ShardedTables(
        [spec], process=process, config=config.sharding, seed=config.seed, learning_rate=rate
    )
    peer = BareTable(spec, process, rate)
    own_rows = ours.pieces()[0].tensor
    peer.own_rows().copy_(own_rows)
    requests = [
        dict(model.ids(batch, StepContext(step=step, rank=process.rank, world_size=process.world_size)))
        for step, batch in enumerate(first_batches(stream, STEPS[request.scale]))
    ]
    gradients = [_gradients(ids, spec.dim) for ids in requests]

    def take_our_steps() -> None:
        for ids, gradient in zip(requests, gradients, strict=True):
            _our_step(ours, ids, gradient)

    def take_peer_steps() -> None:
        for ids, gradient in zip(requests, gradients, strict=True):
            peer.step(ids, gradient)

    timings = interleave(
        process, {"ours": take_our_steps, "peer": take_peer_steps}, rounds=ROUNDS[request.scale]
    )
    result = compare_times(timings["ours"], timings["peer"])
    distinct = [merge_ids([spec], [ids]).tables[spec.name].shape[0] for ids in requests]
    return {
        **result,
        "ours": result["ours"] / len(requests),
        "peer": result["peer"] / len(requests),
        "steps_per_round": len(requests),
        "ids_per_step_and_rank": sum(len(part) for ids in requests for part in ids.values()) / len(requests),
        "distinct_ids_per_step_and_rank": sum(distinct) / len(requests),
        "largest_difference": _largest_difference(own_rows, peer.own_rows()),
    }


def _make_model(config: PretrainConfig, num_items: int) -> SASRec:
    """Only asked which rows it needs."""
    objective = config.objective.build(num_items=num_items)
    return config.model.build(
        num_items=num_items, max_length=config.data.max_length, item_feature_dim=0, objective=objective
    )


def _gradients(ids: Ids, dim: int) -> dict[str, Tensor]:
    """What a dense part would send back."""
    generator = torch.Generator().manual_seed(sum(len(part) for part in ids.values()))
    return {name: 1e-3 * torch.randn(len(part), dim, generator=generator) for name, part in ids.items()}


def _our_step(tables: ShardedTables, ids: Ids, gradients: Mapping[str, Tensor]) -> None:
    """The sparse half of `trainer.learner.Learner.step`."""
    specs = list(tables.specs.values())
    merged = merge_ids(specs, [ids])
    rows = tables.lookup(merged.tables)
    leaves = {name: values.detach().requires_grad_() for name, values in rows.items()}
    found = rows_of_request(specs, leaves, ids, merged.positions[0], {})
    torch.autograd.backward([found[name].rows for name in ids], [gradients[name] for name in ids])
    tables.update(merged.tables, rows, {name: leaf.grad for name, leaf in leaves.items()})


def _largest_difference(ours: Tensor, peer: Tensor) -> float:
    """Between the two tables after all rounds, over all ranks."""
    difference = (ours - peer).abs().max()
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    return difference.item()
