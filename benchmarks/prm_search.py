"""PROMISE's search with a PRM that scores four times the beam, against a plain beam as wide."""

from typing import Any

import torch

from benchmarks.setting.benchmark import Bar, Benchmark, Request, Scale, compare_times
from benchmarks.setting.long_users import LongUsers
from benchmarks.setting.timing import interleave
from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.path_reward import ProcessRewardConfig
from models.promise import Promise
from models.semantic_ids import SemanticIds
from sharding.lookup import make_lookup
from sharding.unsharded import UnshardedTables
from trainer.configuration import SearchConfig
from trainer.generative_search import GenerativeSearch, PrefixReward

BENCHMARK = Benchmark(unit="s per batch of users", bars=(Bar(key="ratio", at_most=1.5),), threads_per_rank=2)
ROUNDS = {"full": 5, "small": 1}
USERS: dict[Scale, LongUsers] = {
    "full": LongUsers(num_users=128, num_items=12_101, longest=40),
    "small": LongUsers(num_users=4, num_items=50, longest=30),
}
# As `promise-amazon` has it.
PRM = ProcessRewardConfig(width=64, feedforward_width=128, likeness_negatives=256)
MODEL: dict[Scale, dict[str, Any]] = {
    "full": {"width": 256, "num_blocks": 4, "num_decoder_blocks": 4, "feedforward_width": 1024, "prm": PRM},
    "small": {"width": 16, "num_blocks": 1, "num_decoder_blocks": 1, "feedforward_width": 32, "prm": PRM},
}
CODES = {"full": 256, "small": 8}
WIDTH = {"full": 50, "small": 4}
FOUND = 10


def measure(process: Process, request: Request) -> dict[str, Any]:
    """One round finds the best items of all users, from their histories on."""
    users, width = USERS[request.scale], WIDTH[request.scale]
    batch = _batch(users)
    plain, guided = _searches(request.scale, users, width)
    find = {"k": min(FOUND, width), "rank_held_out": False, "filter_seen": False}
    sides = {"ours": lambda: guided.find(batch, **find), "peer": lambda: plain.find(batch, **find)}
    timings = interleave(process, sides, rounds=ROUNDS[request.scale])
    return {
        **compare_times(timings["ours"], timings["peer"]),
        "users_per_batch": batch.num_users,
        "history_events": batch.num_tokens,
        "items": users.num_items,
        "width": width,
        "candidates": 4 * width,
    }


def _searches(scale: Scale, users: LongUsers, width: int) -> tuple[GenerativeSearch, GenerativeSearch]:
    """Without and with the PRM of one model."""
    size, device = CODES[scale], torch.device("cpu")
    generator = torch.Generator().manual_seed(1)
    paths = torch.randperm(size**3, generator=generator)[: users.num_items]
    codes = torch.stack((paths // size**2, paths // size % size, paths % size), dim=1)
    model = Promise.Config(**MODEL[scale]).build(
        num_items=users.num_items,
        max_length=users.longest,
        item_feature_dim=0,
        semantic_ids=SemanticIds(codes=codes, code_sizes=(size,) * 3),
    )
    tables = UnshardedTables(model.tables(), seed=0, learning_rate=0.1, device=device)
    lookup = make_lookup(model.tables(), tables, None, device)
    reward = PrefixReward(model=model, lookup=lookup)
    build = GenerativeSearch.build
    return (
        build(model, lookup, codes, config=SearchConfig(width=width), device=device),
        build(model, lookup, codes, config=SearchConfig(width=width, prm=True), device=device, reward=reward),
    )


def _batch(users: LongUsers) -> SequenceBatch:
    lengths = torch.from_numpy(users.lengths())
    items = torch.from_numpy(users.items(int(lengths.sum())))
    return SequenceBatch(user_ids=torch.arange(len(lengths)), items=Jagged.from_lengths(items, lengths))
