"""How a training step of HSTU and SASRec grows with length, users, width and catalogue, beside a padded SASRec."""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers.padded_sasrec import PaddedSASRec
from benchmarks.setting.benchmark import Bar, Benchmark, Request, Scale, compare_times
from benchmarks.setting.long_users import LongUsers
from benchmarks.setting.timing import interleave
from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.hstu import HSTU
from models.item_sequence import ItemSequenceConfig
from models.objectives.full_softmax import FullSoftmax
from models.recommender import StepContext
from models.sasrec import SASRec
from sharding.unsharded import UnshardedTables
from trainer.configuration import TrainConfig
from trainer.dense_module import DenseModule, resolve_precision
from trainer.learner import Learner
from trainer.plain_engine import PlainEngine
from trainer.step_input import prepare_step

BENCHMARK = Benchmark(unit="s per step", bars=(Bar(key="ratio", at_most=1.0),), threads_per_rank=2)
BASE: dict[Scale, dict[str, int]] = {
    "full": {"length": 200, "users": 64, "width": 64, "items": 4_000},
    "small": {"length": 20, "users": 8, "width": 16, "items": 100},
}
VARIED: dict[Scale, dict[str, tuple[int, ...]]] = {
    "full": {
        "length": (25, 50, 100, 200, 400, 800),
        "users": (8, 16, 32, 64, 128),
        "width": (32, 64, 128, 256),
        "items": (1_000, 4_000, 16_000, 64_000),
    },
    "small": {"length": (10, 20), "users": (4, 8)},
}
TRIES = 3
PEER = "padded SASRec"


def measure(process: Process, request: Request) -> dict[str, Any]:
    """Times one thing varied and the others as in BASE; full softmax on our side, one negative on the peer's."""
    base, varied = BASE[request.scale], VARIED[request.scale]
    curves = {
        name: _curve(process, [base | {name: size} for size in sizes], name) for name, sizes in varied.items()
    }
    sides = _sides(process, **(base | {"length": varied["length"][-1]}))
    timings = interleave(process, {name: sides[name] for name in ("HSTU", PEER)}, rounds=TRIES)
    return {**compare_times(timings["HSTU"], timings[PEER]), "curves": curves}


def _curve(process: Process, sizes: list[dict[str, int]], name: str) -> dict[str, dict[int, float]]:
    """Side -> size -> seconds of the quickest of a few steps."""
    curve: dict[str, dict[int, float]] = {}
    for size in sizes:
        for side, take in _sides(process, **size).items():
            take()
            curve.setdefault(side, {})[size[name]] = min(_seconds(take) for _ in range(TRIES))
    return curve


def _seconds(take: Callable[[], object]) -> float:
    started = time.perf_counter()
    take()
    return time.perf_counter() - started


def _sides(
    process: Process, *, length: int, users: int, width: int, items: int
) -> dict[str, Callable[[], object]]:
    """Users of a uniform 1/4..1 of the length, so that padding costs the peer what it does in practice."""
    made_up = LongUsers(num_users=users, num_items=items)
    lengths = torch.linspace(length / 4, length, users).long()
    drawn = torch.from_numpy(made_up.items(int(lengths.sum()) + 1))
    batch = SequenceBatch(
        user_ids=torch.arange(users), items=Jagged.from_lengths(drawn[:-1], lengths), targets=drawn[1:]
    )
    precision = resolve_precision("auto", process.device)
    shape = {"width": width, "num_blocks": 2, "num_heads": 1}
    configs = {"HSTU": HSTU.Config(time_bias=False, **shape), "SASRec": SASRec.Config(**shape)}
    sides = {
        name: _our_step(process, config, batch, length, items, precision) for name, config in configs.items()
    }
    peer = PaddedSASRec(num_negatives=1, precision=precision).build(
        configs["SASRec"], num_items=items, max_length=length, device=process.device
    )
    return {**sides, PEER: lambda: peer.take(batch)}


def _our_step(
    process: Process,
    config: ItemSequenceConfig,
    batch: SequenceBatch,
    max_length: int,
    num_items: int,
    precision: torch.dtype,
) -> Callable[[], object]:
    """A step of the learner on plain torch, so that nothing is measured but the model and its tables."""
    torch.manual_seed(0)
    objective = FullSoftmax.Config(temperature=0.05).build(num_items=num_items)
    model = config.build(num_items=num_items, max_length=max_length, item_feature_dim=0, objective=objective)
    tables = UnshardedTables(model.tables(), seed=0, learning_rate=0.07, device=process.device)
    module = DenseModule(model, precision)
    learner = Learner(module, PlainEngine(module, TrainConfig()), tables, seed=0, rank=0, world_size=1)

    def take() -> None:
        prepared = prepare_step(model, batch, StepContext(step=0), 1, None, process.device)
        learner.step(prepared.with_counts([[batch.num_tokens]]), 1e-3, 0.07)

    return take
