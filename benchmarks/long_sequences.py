"""HSTU and SASRec at the lengths of MovieLens-1M against RecBole and a padded torch.nn SASRec."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.peers.padded_sasrec import PaddedSASRec
from benchmarks.setting.benchmark import Bar, Benchmark, Request, Scale, compare_rates
from benchmarks.setting.cost import time_shares
from benchmarks.setting.long_users import LongUsers
from benchmarks.setting.peer_process import PeerProcess
from benchmarks.setting.plain_operators import plain_operators
from benchmarks.setting.recipe import RunningRecipe, first_batches, recipe_config, start
from benchmarks.setting.timing import Timing, interleave
from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.sasrec import SASRec
from trainer.dense_module import resolve_precision

BENCHMARK = Benchmark(
    unit="supervised targets/s of the slower recipe",
    bars=(Bar(key="ratio", at_least=4.0),),
    threads_per_rank=2,
    on_accelerator=True,
)
RECIPES = {"HSTU": "hstu-ml-1m", "SASRec": "sasrec-ml-1m"}
USERS: dict[Scale, LongUsers] = {
    "full": LongUsers(),
    "small": LongUsers(num_users=24, num_items=300, log_mean=3.0, longest=40),
    "accelerator": LongUsers(num_users=2048),
}
ROUNDS = {"full": 5, "small": 1, "accelerator": 5}
TOKENS_ON_ACCELERATOR = 65_536
"""Of a step, in place of the recipe's."""
ROWS_OF_RECBOLE = {"full": 128, "small": 8}
"""Its environment has a torch without CUDA."""
NEGATIVES = (1, 128)


def measure(process: Process, request: Request) -> dict[str, Any]:
    """One round trains on all users once, but for RecBole, which takes one step on some of its rows."""
    data = USERS[request.scale].build(Path(request.scratch) / "users")
    ours = {name: _start(process, data, recipe, request.scale) for name, recipe in RECIPES.items()}
    batches = {name: first_batches(recipe.stream, 10**6) for name, recipe in ours.items()}
    everyone = _join(batches["SASRec"])
    sides: dict[str, Callable[[], object]] = {
        name: lambda name=name: ours[name].take_steps(batches[name]) for name in ours
    }
    sides |= _padded_sides(ours["SASRec"], everyone)
    if request.scale == "accelerator":
        timings = interleave(process, sides, rounds=ROUNDS[request.scale])
        return _result(everyone.num_tokens, timings, request.scale)
    plain = {name: plain_operators()(sides[name]) for name in ours}
    sides |= {f"{name}, plain operators": run for name, run in plain.items()}
    timings = _beside_recbole(process, request, sides, everyone, ours["SASRec"].config.model)
    return _result(everyone.num_tokens, timings, request.scale) | {
        "targets_per_round": everyone.num_tokens,
        "time_shares": {name: time_shares(sides[name]) for name in ours},
        "time_shares_of_plain_operators": {name: time_shares(run) for name, run in plain.items()},
    }


def _start(process: Process, data: str, recipe: str, scale: Scale) -> RunningRecipe:
    config = recipe_config(data, recipe)
    if scale == "accelerator":
        config = replace(
            config,
            data=replace(config.data, tokens_per_step=TOKENS_ON_ACCELERATOR),
            cluster=replace(config.cluster, in_process=True),
        )
    return start(process, config)


def _beside_recbole(
    process: Process,
    request: Request,
    sides: dict[str, Callable[[], object]],
    everyone: SequenceBatch,
    config: SASRec.Config,
) -> dict[str, Timing]:
    """The sides, and RecBole's models in an environment of their own."""
    rows = ROWS_OF_RECBOLE[request.scale]
    recbole = _start_recbole(Path(request.scratch), everyone, config, request.scale)
    recbole_cpu_s: dict[str, list[float]] = {"SASRec": [], "GRU4Rec": []}
    for model, cpu_s in recbole_cpu_s.items():
        sides[f"RecBole {model}"] = lambda model=model, cpu_s=cpu_s: cpu_s.append(
            recbole.ask(model=model, num_rows=rows)["cpu_s"]
        )
    timings = interleave(process, sides, rounds=ROUNDS[request.scale])
    recbole.close()
    for model, cpu_s in recbole_cpu_s.items():
        timings[f"RecBole {model}"].cpu_s = cpu_s[1:]
    return timings


def _result(num_targets: int, timings: dict[str, Timing], scale: Scale) -> dict[str, Any]:
    targets = dict.fromkeys(timings, num_targets)
    targets |= {name: ROWS_OF_RECBOLE[scale] for name in timings if name.startswith("RecBole")}
    rates = {name: targets[name] / timing.best_s for name, timing in timings.items()}
    slower = min(RECIPES, key=lambda name: rates[name])
    peers = [name for name in rates if name.split(",")[0] not in RECIPES]
    peer = max(peers, key=lambda name: rates[name])
    return {
        # Every real token has a target on our side and the padded one.
        **compare_rates(num_targets, timings[slower], timings[peer]),
        "best_peer": peer,
        "targets_per_s": rates,
        "ratio_of": {name: rates[name] / rates[peer] for name in RECIPES},
        "seconds_of_round": {name: timing.best_s for name, timing in timings.items()},
    }


def _padded_sides(recipe: RunningRecipe, batch: SequenceBatch) -> dict[str, Callable[[], object]]:
    batch = batch.to(recipe.process.device)
    own = resolve_precision(recipe.config.train.precision, recipe.process.device)
    sides = {}
    for num_negatives in NEGATIVES:
        for precision in dict.fromkeys((torch.float32, own)):
            peer = PaddedSASRec(num_negatives=num_negatives, precision=precision).build(
                recipe.config.model,
                num_items=recipe.assembly.items.num_items,
                max_length=recipe.config.data.max_length,
                device=recipe.process.device,
            )
            name = str(precision).removeprefix("torch.")
            sides[f"padded SASRec, {num_negatives} negatives, {name}"] = lambda peer=peer: peer.take(batch)
    return sides


def _start_recbole(folder: Path, batch: SequenceBatch, config: SASRec.Config, scale: Scale) -> PeerProcess:
    users = USERS[scale]
    shape = {
        "num_items": users.num_items,
        "max_length": users.longest,
        "num_blocks": config.num_blocks,
        "num_heads": config.num_heads,
        "width": config.width,
    }
    (folder / "shape.json").write_text(json.dumps(shape))
    inputs = {"items": batch.items.values, "targets": batch.targets, "lengths": batch.items.lengths}
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, folder / "inputs.safetensors")
    return PeerProcess("benchmarks.peers.recbole_models", folder, torch.get_num_threads())


def _join(batches: Sequence[SequenceBatch]) -> SequenceBatch:
    """The users of several steps as one batch, as the peers take them."""
    return SequenceBatch(
        user_ids=torch.cat([batch.user_ids for batch in batches]),
        items=Jagged.from_lengths(
            torch.cat([batch.items.values for batch in batches]),
            torch.cat([batch.items.lengths for batch in batches]),
        ),
        targets=torch.cat([batch.targets for batch in batches]),
    )
