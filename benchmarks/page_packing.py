"""GenRec trained on all pages of a user behind one copy of the history, against one row per page, on the world."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.setting.benchmark import Bar, Benchmark, Request, Scale, compare_times
from benchmarks.setting.timing import interleave
from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.build import BuildConfig, build
from data_streams.configuration import DataConfig
from data_streams.jagged import Jagged
from data_streams.sources.world import WorldSource
from data_streams.stream import TrainStream
from models.genrec import GenRec
from models.recommender import StepContext
from models.semantic_ids import SemanticIds

BENCHMARK = Benchmark(
    unit="s per step",
    bars=(Bar(key="fewer_tokens", at_least=3.0), Bar(key="time_in_proportion", at_least=0.8)),
    threads_per_rank=2,
)
ROUNDS = {"full": 3, "small": 1}
WORLD: dict[Scale, WorldSource.Config] = {
    "full": WorldSource.Config(num_users=200, num_items=1_500, mean_clicks=45.0),
    "small": WorldSource.Config(num_users=20, num_items=100, num_clusters=4, mean_clicks=10.0),
}
USERS = {"full": 8, "small": 4}
MODEL: dict[Scale, dict[str, int]] = {
    "full": {"width": 128, "num_blocks": 4, "feedforward_width": 512},
    "small": {"width": 16, "num_blocks": 1, "feedforward_width": 32},
}
SIDES = {
    "ours": {"merge": False, "separators": True, "packed": True},
    "peer": {"merge": False, "separators": True, "packed": False},
    "merged": {"merge": True, "separators": True, "packed": True},
    "merged_rows": {"merge": True, "separators": True, "packed": False},
}
CODES, LENGTH = 32, 200


def measure(process: Process, request: Request) -> dict[str, Any]:
    """One round is the forward and backward pass over all pages of some users.

    Proportions are those of processor time, which other work on the machine moves less than seconds.
    """
    packed = _batch(request)
    rows, sides, tokens = one_row_per_page(packed), {}, {}
    for name, options in SIDES.items():
        model = _model(request.scale, merge=options["merge"], separators=options["separators"])
        batch = packed if options["packed"] else rows
        tokens[name] = batch.num_tokens * model.tokens_per_item + 3 * model.num_targets(batch)
        sides[name] = lambda model=model, batch=batch: _train(model, batch)
    timings = interleave(process, sides, rounds=ROUNDS[request.scale])
    best = {name: min(timing.cpu_s) for name, timing in timings.items()}
    fewer = tokens["peer"] / tokens["ours"]
    return {
        **compare_times(timings["ours"], timings["peer"]),
        "fewer_tokens": fewer,
        "time_in_proportion": best["peer"] / best["ours"] / fewer,
        "fewer_tokens_merged": tokens["merged_rows"] / tokens["merged"],
        "times_faster_merged": best["merged_rows"] / best["merged"],
        "step_with_merger": best["merged"] / best["ours"],
        "step_with_merger_one_row_per_page": best["merged_rows"] / best["peer"],
        "tokens": tokens,
        "pages_per_user": packed.pages.num_pages / packed.num_users,
        "items_per_page": packed.pages.items.lengths.float().mean().item(),
        "events_per_user": packed.num_tokens / packed.num_users,
    }


def one_row_per_page(batch: SequenceBatch) -> SequenceBatch:
    """Every page with a copy of the history before it."""
    pages, seen = batch.pages, batch.pages.history_lengths.values
    copies = Jagged.from_lengths(torch.zeros(int(seen.sum())), seen)
    starts = batch.items.offsets[pages.history_lengths.row_index()]
    items = batch.items.values[starts[copies.row_index()] + copies.places()]
    return SequenceBatch(
        user_ids=batch.user_ids[pages.history_lengths.row_index()],
        items=copies.with_values(items),
        pages=replace(pages, history_lengths=Jagged.from_lengths(seen, torch.ones_like(seen))),
    )


def _train(model: GenRec, batch: SequenceBatch) -> None:
    model.zero_grad()
    model({}, batch, StepContext(step=0)).sum.backward()


def _model(scale: Scale, **options: bool) -> GenRec:
    num_items = WORLD[scale].num_items
    paths = torch.randperm(CODES**3, generator=torch.Generator().manual_seed(1))[:num_items]
    codes = torch.stack((paths // CODES**2, paths // CODES % CODES, paths % CODES), dim=1)
    torch.manual_seed(0)
    return GenRec.Config(**MODEL[scale], **options, dropout=0.0).build(
        num_items=num_items,
        max_length=LENGTH,
        item_feature_dim=0,
        semantic_ids=SemanticIds(codes=codes, code_sizes=(CODES,) * 3),
    )


def _batch(request: Request) -> SequenceBatch:
    """Users of the world with all their pages: what was shown, clicked and bought."""
    path = str(Path(request.scratch) / "world")
    source = WORLD[request.scale]
    build(source, BuildConfig(out=path, ray="never", keep_exposures=True, page_actions=("cart", "purchase")))
    config = DataConfig(path=path, pages="recorded", max_length=LENGTH, num_streams=1, tokens_per_step=10**6)
    batch = next(iter(TrainStream(config, seed=0, rank=0, world_size=1).batches(0)))
    return batch.select(0, USERS[request.scale])
