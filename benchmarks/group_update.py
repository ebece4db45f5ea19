"""The update of groups of 2 to 32 completions that share a prompt, against a row of its own for each completion."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.setting.benchmark import Bar, Benchmark, Request, Scale, compare_times
from benchmarks.setting.timing import interleave
from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.decoder_only import DecoderOnly
from models.recommender import StepContext
from models.semantic_ids import SemanticIds
from models.tables import Rows
from rl.configuration import AlignOptions
from rl.drawing import Drawing
from rl.objectives.grpo_sr import GrpoSr
from rl.policy import PolicyModule, experience
from rl.prompts import POSITIVES
from rl.types import Advantages, Completions, Prompts
from sharding.lookup import make_lookup
from sharding.unsharded import UnshardedTables

BENCHMARK = Benchmark(
    unit="s for 8 users with 16 completions",
    bars=(Bar(key="time_of_16_by_2", at_most=2.0), Bar(key="largest_difference", at_most=1e-4)),
    threads_per_rank=1,
)
GROUPS: dict[Scale, tuple[int, ...]] = {"full": (2, 4, 8, 16, 32), "small": (2, 16)}
ROUNDS: dict[Scale, int] = {"full": 5, "small": 1}
PROMPT: dict[Scale, int] = {"full": 240, "small": 20}
WIDTH: dict[Scale, int] = {"full": 128, "small": 16}
USERS, ITEMS, CODES, COMPARED = 8, 2_000, 64, 16


def measure(process: Process, request: Request) -> dict[str, Any]:
    """One round is forward and backward of the objective for all users; the prompt has 240 items."""
    model, lookup = _make_model(request.scale)
    sides, gradients = {}, {}
    for group in GROUPS[request.scale]:
        batch, own_rows = _make_batch(model, PROMPT[request.scale], group)
        sides[str(group)] = _update(model, lookup, batch, group, gradients, "shared")
        if group == COMPARED:
            sides["rows of their own"] = _update(model, lookup, own_rows, 1, gradients, "own")
    timings = interleave(process, sides, rounds=ROUNDS[request.scale])
    seconds = {name: timing.best_s for name, timing in timings.items()}
    return {
        **compare_times(timings[str(COMPARED)], timings["rows of their own"]),
        "seconds_by_group": seconds,
        "time_of_16_by_2": seconds[str(COMPARED)] / seconds["2"],
        "largest_difference": _difference(gradients["shared", COMPARED], gradients["own", 1] / COMPARED),
        "prompt": PROMPT[request.scale],
    }


def _make_model(scale: Scale) -> tuple[DecoderOnly, Callable[..., Rows]]:
    torch.manual_seed(0)
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, CODES, (ITEMS, 3)))
    config = DecoderOnly.Config(width=WIDTH[scale], num_blocks=2, dropout=0.0, init_scale=0.1)
    model = config.build(
        num_items=ITEMS,
        max_length=PROMPT[scale],
        item_feature_dim=0,
        semantic_ids=SemanticIds(codes=codes, code_sizes=(CODES,) * 3),
    )
    device = torch.device("cpu")
    tables = UnshardedTables(model.tables(), seed=0, learning_rate=0.0, device=device)
    return model, make_lookup(model.tables(), tables, None, device)


def _make_batch(model: DecoderOnly, prompt: int, group: int) -> tuple[SequenceBatch, SequenceBatch]:
    """Users with their completions, and the same as one user for each completion."""
    random = np.random.default_rng(1)
    items = torch.from_numpy(random.integers(0, ITEMS, USERS * prompt))
    paths = random.integers(0, CODES, (USERS, group, 3))
    shared = _with_completions(model, Jagged.from_lengths(items, torch.full((USERS,), prompt)), paths)
    own = _with_completions(model, shared.items.repeat_rows(group), paths.reshape(-1, 1, 3))
    return shared, own


def _with_completions(model: DecoderOnly, items: Jagged, paths: np.ndarray) -> SequenceBatch:
    shape, nobody = paths.shape[:2], np.zeros(0, dtype=np.int64)
    offsets = np.zeros(shape[0] + 1, dtype=np.int64)
    users = torch.arange(shape[0])
    prompts = Prompts(
        serials=users.numpy(),
        user_rows=users.numpy(),
        history=items.values.numpy(),
        history_offsets=items.offsets.numpy(),
        positives=nobody,
        positive_offsets=offsets,
        positive_paths=np.zeros((0, paths.shape[-1]), dtype=np.int64),
    )
    completions = Completions(
        prompts=prompts,
        paths=paths,
        items=np.zeros(shape, dtype=np.int64),
        log_probs=np.zeros(paths.shape, dtype=np.float32),
        policy_version=0,
    )
    values = paths[..., 0].astype(np.float32) / CODES
    advantages = Advantages(
        values=values, mask=np.ones(shape, dtype=bool), skipped=np.zeros(shape[0], dtype=bool)
    )
    taken = Jagged.from_lengths(torch.zeros(0, dtype=torch.int64), torch.zeros_like(users))
    batch = SequenceBatch(user_ids=users, items=items, supervision={POSITIVES: taken})
    learnt = experience(batch, completions, advantages, model.item_codes)
    return dataclasses.replace(batch, supervision=learnt)


def _update(
    model: DecoderOnly,
    lookup: Callable[..., Rows],
    batch: SequenceBatch,
    group: int,
    gradients: dict[tuple[str, int], Tensor],
    name: str,
) -> Callable[[], None]:
    options = AlignOptions(group_size=max(group, 2))
    drawing = Drawing(options, model.item_codes, model.code_sizes, seed=0, precision=torch.float32)
    # Alignment itself compares at least two completions; a row of its own has one.
    drawing.group_size = group
    module = PolicyModule(model, torch.float32, objective=GrpoSr.Config(alpha=0.0).build(), drawing=drawing)
    rows = lookup(model.prompt_ids(batch))

    def run() -> None:
        model.zero_grad()
        module.loss(rows, batch, StepContext(step=0)).sum.backward()
        # The loss itself is the same whatever the policy: its ratio is 1.
        gradients[name, group] = torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )

    return run


def _difference(ours: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest gradient."""
    return ((ours - expected).abs().max() / expected.abs().max()).item()
