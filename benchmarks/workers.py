"""Two workers of one thread against one worker of two threads, on the same recipe and users."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.setting.benchmark import Bar, Benchmark, Request, Scale, compare_rates
from benchmarks.setting.cost import collective_share
from benchmarks.setting.long_users import LongUsers
from benchmarks.setting.peer_process import PeerProcess
from benchmarks.setting.recipe import RunningRecipe, first_batches, start_recipe
from benchmarks.setting.timing import interleave
from cluster.process import Process
from data_streams.batch import SequenceBatch

BENCHMARK = Benchmark(
    unit="supervised targets/s", bars=(Bar(key="ratio", at_least=0.9),), world_size=2, threads_per_rank=1
)
RECIPE = "hstu-ml-1m"
USERS: dict[Scale, LongUsers] = {
    "full": LongUsers(),
    "small": LongUsers(num_users=24, num_items=300, log_mean=3.0, longest=40),
}
ROUNDS = {"full": 5, "small": 1}


def measure(process: Process, request: Request) -> dict[str, Any]:
    """One round trains on all users once; while one side works the other waits without using a core."""
    folder = Path(request.scratch)
    data = str(folder / "users" / "shards")
    peer = None
    if process.rank == 0:
        USERS[request.scale].build(folder / "users")
        (folder / "data").write_text(data)
        (folder / "recipe").write_text(RECIPE)
        peer = PeerProcess(
            "benchmarks.peers.one_worker", folder, torch.get_num_threads() * process.world_size
        )
    dist.barrier(group=process.host_group)
    recipe = start_recipe(process, data, RECIPE)
    batches = _same_number(first_batches(recipe.stream, 10**6), recipe, process)
    num_targets = torch.tensor(sum(batch.num_tokens for batch in batches))
    dist.all_reduce(num_targets, group=process.host_group)
    counts = _counts_of_steps([batch.num_tokens for batch in batches], process)
    peer_cpu_s: list[float] = []

    def one_worker() -> None:
        if peer is not None:
            peer_cpu_s.append(peer.ask()["cpu_s"])
        # The other rank waits here for the peer to end.
        dist.barrier(group=process.host_group)

    def two_workers() -> None:
        recipe.take_steps(batches, counts)

    timings = interleave(
        process, {"two workers": two_workers, "one worker": one_worker}, rounds=ROUNDS[request.scale]
    )
    share = collective_share(two_workers)
    if peer is not None:
        peer.close()
        timings["one worker"].cpu_s = peer_cpu_s[1:]
    return {
        **compare_rates(int(num_targets), timings["two workers"], timings["one worker"]),
        "share_of_time_in_collectives": share,
    }


def _same_number(
    batches: list[SequenceBatch], recipe: RunningRecipe, process: Process
) -> list[SequenceBatch]:
    """With empty batches behind those of a rank that runs out first."""
    most = torch.tensor(len(batches))
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=process.host_group)
    return batches + [recipe.stream.empty_batch()] * (int(most) - len(batches))


def _counts_of_steps(own: list[int], process: Process) -> list[list[int]]:
    """Targets of every rank in every step."""
    everyone = [torch.zeros(len(own), dtype=torch.int64) for _ in range(process.world_size)]
    dist.all_gather(everyone, torch.tensor(own), group=process.host_group)
    return torch.stack(everyone, dim=1).tolist()
