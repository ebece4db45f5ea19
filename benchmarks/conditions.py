"""Climber-Pilot asked under 8 conditions at once against the same users asked under one: the backbone is shared."""

from typing import Any

import numpy as np
import torch

from benchmarks.setting.benchmark import Bar, Benchmark, Request, Scale, compare_times
from benchmarks.setting.long_users import LongUsers
from benchmarks.setting.timing import interleave
from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.climber_pilot import ClimberPilot
from models.objectives.sampled_softmax import SampledSoftmax
from sharding.lookup import make_lookup
from sharding.unsharded import UnshardedTables
from trainer.search import RetrievalSearch

BENCHMARK = Benchmark(unit="s per batch of users", bars=(Bar(key="ratio", at_most=2.0),), threads_per_rank=2)
ROUNDS = {"full": 5, "small": 1}
USERS: dict[Scale, LongUsers] = {
    "full": LongUsers(num_users=128, num_items=12_101),
    "small": LongUsers(num_users=4, num_items=50, longest=30),
}
WIDTH = {"full": 128, "small": 16}
CONDITIONS, OF_ITEM, TOGETHER, FOUND = 40, 3, 8, 50


def measure(process: Process, request: Request) -> dict[str, Any]:
    """One round makes the users' queries and finds the best items of each, among all of them."""
    users = USERS[request.scale]
    search, batch = _search(users, WIDTH[request.scale]), _batch(users)
    sides = {
        "ours": lambda: _recommend(search, batch, TOGETHER),
        "peer": lambda: _recommend(search, batch, 1),
    }
    timings = interleave(process, sides, rounds=ROUNDS[request.scale])
    return {
        **compare_times(timings["ours"], timings["peer"]),
        "users_per_batch": batch.num_users,
        "history_events": batch.num_tokens,
        "items": users.num_items,
        "conditions": TOGETHER,
    }


def _recommend(search: RetrievalSearch, batch: SequenceBatch, conditions: int) -> torch.Tensor:
    wanted = torch.arange(conditions).expand(batch.num_users, -1)
    queries = search.queries_under(batch, wanted).flatten(0, 1)
    return search.index.search(queries, min(FOUND, search.num_items))[0]


def _search(users: LongUsers, width: int) -> RetrievalSearch:
    """The paper's three layers: two shared blocks and the branch."""
    table = np.random.default_rng(0).integers(0, CONDITIONS, (users.num_items, OF_ITEM)).astype(np.int32)
    model = ClimberPilot.Config(
        width=width, num_blocks=2, num_heads=4, num_branches=1, condition_column="kind"
    ).build(
        num_items=users.num_items,
        max_length=users.longest,
        item_feature_dim=0,
        objective=SampledSoftmax.Config().build(num_items=users.num_items),
        condition_table=table,
        condition_names=tuple(map(str, range(CONDITIONS))),
    )
    device = torch.device("cpu")
    tables = UnshardedTables(model.tables(), seed=0, learning_rate=0.1, device=device)
    lookup = make_lookup(model.tables(), tables, None, device)
    return RetrievalSearch.build(model, lookup, num_items=users.num_items, device=device)


def _batch(users: LongUsers) -> SequenceBatch:
    lengths = torch.from_numpy(users.lengths())
    items = torch.from_numpy(users.items(int(lengths.sum())))
    return SequenceBatch(user_ids=torch.arange(len(lengths)), items=Jagged.from_lengths(items, lengths))
