"""A whole training step of `sasrec-amazon` against a padded torch.nn.TransformerEncoder with full softmax."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.peers.padded_transformer import PaddedStep, PaddedTrainer
from benchmarks.setting.benchmark import Bar, Benchmark, Request, compare_rates
from benchmarks.setting.recipe import RunningRecipe, first_batches, start_recipe
from benchmarks.setting.timing import interleave
from cluster.process import Process
from data_streams.batch import SequenceBatch
from trainer.dense_module import resolve_precision

BENCHMARK = Benchmark(unit="supervised targets/s", bars=(Bar(key="ratio", at_least=4.0),), threads_per_rank=2)
ROUNDS = {"full": 3, "small": 1}
STEPS = {"full": 4, "small": 1}


def measure(process: Process, request: Request) -> dict[str, Any]:
    """One round trains on the users of some steps, each side from their unpadded ids on the host."""
    recipe = start_recipe(process, request.data)
    batches = first_batches(recipe.stream, STEPS[request.scale])
    precision = resolve_precision(recipe.config.train.precision, process.device)
    peers = {
        f"{'trimmed ' if trimmed else ''}{_name(dtype)}": _peer(recipe, dtype, trimmed)
        for trimmed in (False, True)
        for dtype in dict.fromkeys((torch.float32, precision))
    }
    sides = {"ours": lambda: recipe.take_steps(batches)}
    sides |= {name: _all_steps(peer, batches) for name, peer in peers.items()}
    timings = interleave(process, sides, rounds=ROUNDS[request.scale])
    quickest = {
        trimmed: min(
            (name for name in peers if name.startswith("trimmed") == trimmed),
            key=lambda name: timings[name].best_s,
        )
        for trimmed in (False, True)
    }
    num_targets = sum(batch.num_tokens for batch in batches)
    result = compare_rates(num_targets, timings["ours"], timings[quickest[False]])
    return {
        **result,
        # Every real token has a target, on both sides.
        "real_tokens_per_s": {side: result[side] for side in ("ours", "peer")},
        "our_precision": _name(precision),
        "peer_precision": quickest[False],
        "ratio_to_trimmed_peer": timings[quickest[True]].best_s / timings["ours"].best_s,
        "targets_per_step": num_targets / len(batches),
        "step_s": {name: timing.best_s / len(batches) for name, timing in timings.items()},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _peer(recipe: RunningRecipe, precision: torch.dtype, trimmed: bool) -> PaddedStep:
    return PaddedTrainer(precision=precision, trimmed=trimmed).build(
        recipe.config.model,
        num_items=recipe.assembly.items.num_items,
        max_length=recipe.config.data.max_length,
        learning_rate=recipe.config.train.learning_rate,
    )


def _all_steps(peer: PaddedStep, batches: Sequence[SequenceBatch]) -> Callable[[], None]:
    def take() -> None:
        for batch in batches:
            peer.take(batch)

    return take
