"""Reading: columnar chunks against one WebDataset sample per user; and how long the recipe waits for data."""

import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from benchmarks.peers.user_samples import padded_batches, write_user_samples
from benchmarks.setting.benchmark import Bar, Benchmark, Request, compare_rates
from benchmarks.setting.recipe import RunningRecipe, recipe_config, start_recipe, train_stream
from benchmarks.setting.timing import interleave
from cluster.process import Process
from trainer.feed import Feed
from trainer.step_input import StepInput

BENCHMARK = Benchmark(
    unit="tokens/s",
    bars=(Bar(key="ratio", at_least=50.0), Bar(key="recipe_wait_share", at_most=0.02)),
    threads_per_rank=1,
)
ROUNDS = {"full": 5, "small": 1}
WARM_UP_STEPS = {"full": 10, "small": 1}
STEPS = {"full": 50, "small": 3}


def measure(process: Process, request: Request) -> dict[str, Any]:
    """One round reads a whole epoch in the batches of the recipe: both sides give the same users."""
    config = recipe_config(request.data)
    stream, epochs = train_stream(process, config), count(1)
    shards = write_user_samples(stream.batches(0), Path(request.scratch) / "samples")
    num_users = sum(batch.num_users for batch in stream.batches(0))
    num_tokens = sum(batch.num_tokens for batch in stream.batches(0))
    users_per_batch = max(num_users * config.data.tokens_per_step // num_tokens, 1)

    def read_chunks() -> None:
        _require_all(num_tokens, sum(batch.num_tokens for batch in stream.batches(next(epochs))))

    def read_samples() -> None:
        masks = (mask for _, _, mask in padded_batches(shards, users_per_batch))
        _require_all(num_tokens, sum(int(mask.sum()) for mask in masks))

    timings = interleave(process, {"ours": read_chunks, "peer": read_samples}, rounds=ROUNDS[request.scale])
    recipe = start_recipe(process, request.data)
    return {
        **compare_rates(num_tokens, timings["ours"], timings["peer"]),
        "tokens_per_round": num_tokens,
        "users_per_round": num_users,
        **_waiting(recipe, process, WARM_UP_STEPS[request.scale], STEPS[request.scale]),
    }


def _require_all(expected: int, found: int) -> None:
    if found != expected:
        raise AssertionError(f"a round must read {expected} tokens and has read {found}")


def _waiting(recipe: RunningRecipe, process: Process, warm_up_steps: int, num_steps: int) -> dict[str, Any]:
    """How much of real training steps is spent in waiting for the next batch."""
    feed = _feed(recipe, process)
    steps, train = _endless_steps(feed), recipe.config.train

    def take(number: int) -> None:
        for step_input in islice(steps, number):
            recipe.learner.step(step_input, train.learning_rate, train.table_learning_rate)

    take(warm_up_steps)
    started, waited_before = time.perf_counter(), feed.wait_s
    take(num_steps)
    seconds = time.perf_counter() - started
    return {
        "recipe_wait_share": (feed.wait_s - waited_before) / seconds,
        "recipe_step_s": seconds / num_steps,
        "recipe_steps": num_steps,
    }


def _endless_steps(feed: Feed) -> Iterator[StepInput]:
    taken = 0
    for epoch in count():
        for step_input, _ in feed.steps(epoch, None, taken):
            taken += 1
            yield step_input


def _feed(recipe: RunningRecipe, process: Process) -> Feed:
    return Feed(
        recipe.stream,
        recipe.assembly.model,
        recipe.assembly.item_features,
        process,
        seed=recipe.config.seed,
        micro_batches=recipe.config.train.micro_batches,
        prefetch_steps=recipe.config.data.prefetch_steps,
        stop_requested=lambda: False,
        checkpoint_after=lambda: None,
    )
