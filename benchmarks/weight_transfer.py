"""Dense weights from the learner to two rollout workers: arrays in the object store, against torch tensors there.

A broadcast over gloo is timed beside them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ray
import torch
from torch import nn

from benchmarks.setting.benchmark import Bar, Benchmark, Request, Scale, compare_times
from benchmarks.setting.timing import interleave
from cluster.configuration import ClusterConfig
from cluster.pool import Pool
from cluster.process import Process
from cluster.ray_start import start_ray
from cluster.shared_object import SharedObject
from rl.weight_broadcast import HeldWeights, WeightCall, WeightSender
from rl.weight_sync import FETCH_TIMEOUT_S, FlatWeights, put_weights
from trainer.plain_engine import named_trainable

BENCHMARK = Benchmark(
    unit="s from learner to 2 workers",
    bars=(Bar(key="ratio", at_most=1.0), Bar(key="ours", at_most=1.0)),
    threads_per_rank=1,
)
PARAMETERS: dict[Scale, int] = {"full": 20_000_000, "small": 100_000}
ROUNDS: dict[Scale, int] = {"full": 5, "small": 1}
MATRICES, WORKERS = 20, 2
START_TIMEOUT_S = 60.0


def measure(process: Process, request: Request) -> dict[str, Any]:
    """One round gathers the weights on the host, brings them to the workers, and fills a model in each."""
    model = make_model(PARAMETERS[request.scale])
    start_ray(ClusterConfig(), num_cpus=2)
    with Pool(
        *(build_worker, PARAMETERS[request.scale]),
        members=WORKERS,
        cluster=ClusterConfig(),
        cpus_per_member=0.5,
    ) as pool:
        sender = WeightSender(pool, nccl=False, start_timeout_s=START_TIMEOUT_S)
        sides = {
            "arrays": lambda: _send(pool, _flat(model).arrays()),
            "broadcast": lambda: _broadcast(sender, _flat(model)),
            "tensors": lambda: _send(pool, {name: t.detach().clone() for name, t in named_trainable(model)}),
        }
        timings = interleave(process, sides, rounds=ROUNDS[request.scale])
    ray.shutdown()
    return {
        **compare_times(timings["arrays"], timings["tensors"]),
        "broadcast_s": timings["broadcast"].best_s,
        "broadcast_rounds_s": timings["broadcast"].wall_s,
        "bytes": sum(tensor.numel() * 4 for _, tensor in named_trainable(model)),
        "workers": WORKERS,
    }


def _flat(model: nn.Module) -> FlatWeights:
    weights = named_trainable(model)
    return FlatWeights(
        layout=tuple((name, tensor.numel()) for name, tensor in weights),
        values=torch.cat([tensor.detach().view(-1) for _, tensor in weights]),
    )


def _broadcast(sender: WeightSender, weights: FlatWeights) -> None:
    assert sender.send(0, weights), "the log says what went wrong"


def _send(pool: Pool, weights: Mapping[str, Any]) -> None:
    shared = SharedObject.put(weights)
    for _ in range(WORKERS):
        pool.submit(shared)
    while pool.pending:
        pool.poll()


def make_model(parameters: int) -> nn.Module:
    width = int((parameters / MATRICES) ** 0.5)
    return nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(MATRICES))


def build_worker(parameters: int) -> Callable[[SharedObject | WeightCall], int]:
    """What a rollout worker does with new weights."""
    model = make_model(parameters)
    held = HeldWeights(model)

    def take(shared: SharedObject | WeightCall) -> int:
        if isinstance(shared, WeightCall):
            return held.receive(shared)
        weights = shared.get(FETCH_TIMEOUT_S)
        if isinstance(next(iter(weights.values())), torch.Tensor):
            model.load_state_dict(weights)
        else:
            put_weights(model, weights)
        return len(weights)

    return take
