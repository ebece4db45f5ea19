"""Groups scored per second by 1, 2 and 4 reward workers when a call waits 50 ms, against a plain loop."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from benchmarks.setting.benchmark import Bar, Benchmark, Request, compare_rates
from benchmarks.setting.timing import Timing, interleave
from cluster.configuration import ClusterConfig
from cluster.process import Process
from cluster.ray_start import start_ray
from rl.reward_mix import RewardTerm
from rl.reward_pool import RewardPool, RewardPoolConfig, build_scorer
from rl.rewards import RewardSetting
from rl.rewards.python_function import PythonFunction
from rl.types import Group

BENCHMARK = Benchmark(
    unit="groups/s with 4 workers",
    bars=(Bar(key="ratio", at_least=3.0), Bar(key="speedup_of_2_workers", at_least=1.6)),
    threads_per_rank=1,
)
WAIT_S = 0.05
GROUPS_PER_CALL = 8
SAMPLES, LEVELS = 16, 3
WORKERS = {"full": (1, 2, 4), "small": (1, 2)}
CALLS = {"full": 16, "small": 4}
ROUNDS = {"full": 5, "small": 1}
SETTING = RewardSetting(data_path="")
TERMS = [
    RewardTerm(name="waits", reward=PythonFunction.Config(path="benchmarks.reward_workers:answer_later"))
]


async def answer_later(groups: Sequence[Group]) -> list[np.ndarray]:
    """What a reward behind a network does: it waits."""
    await asyncio.sleep(WAIT_S)
    return [group.items.astype(np.float32) for group in groups]


def measure(process: Process, request: Request) -> dict[str, Any]:
    """One round scores a batch of users; the loop calls the same reward in this process."""
    groups = make_groups(CALLS[request.scale] * GROUPS_PER_CALL)
    score = build_scorer(TERMS, SETTING)
    start_ray(ClusterConfig(), num_cpus=2)

    def loop() -> None:
        for start in range(0, len(groups), GROUPS_PER_CALL):
            score(groups[start : start + GROUPS_PER_CALL])

    timings = {
        workers: _time_workers(process, workers, groups, loop, ROUNDS[request.scale])
        for workers in WORKERS[request.scale]
    }
    ray.shutdown()
    rates = {workers: len(groups) / pool.best_s for workers, (pool, _) in timings.items()}
    pool, plain = timings[max(timings)]
    return {
        **compare_rates(len(groups), pool, plain),
        "groups_per_s": {str(workers): rate for workers, rate in rates.items()},
        "speedup_of_2_workers": rates[2] / rates[1],
        "wait_s": WAIT_S,
        "groups_per_call": GROUPS_PER_CALL,
    }


def _time_workers(
    process: Process, workers: int, groups: list[Group], loop: Any, rounds: int
) -> tuple[Timing, Timing]:
    config = RewardPoolConfig(workers=workers, cpus_per_worker=0.25, groups_per_call=GROUPS_PER_CALL)
    with RewardPool(TERMS, SETTING, config=config, cluster=ClusterConfig()) as pool:
        while len(pool.pids) < workers:
            pool.collect(pool.submit(groups[:GROUPS_PER_CALL]))
        sides = {"pool": lambda: pool.collect(pool.submit(groups)), "loop": loop}
        timings = interleave(process, sides, rounds=rounds)
    return timings["pool"], timings["loop"]


def make_groups(count: int) -> list[Group]:
    random = np.random.default_rng(0)
    return [
        Group(
            serial=serial,
            user_row=serial,
            history=random.integers(0, 1000, 50),
            positives=random.integers(0, 1000, 1),
            positive_paths=random.integers(0, 256, (1, LEVELS)),
            paths=random.integers(0, 256, (SAMPLES, LEVELS)),
            items=random.integers(0, 1000, SAMPLES),
            log_probs=random.random(SAMPLES).astype(np.float32),
        )
        for serial in range(count)
    ]
