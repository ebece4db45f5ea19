"""TIGER's training step against a padded T5 of Hugging Face of the same size, one row per prefix of a user."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.setting.benchmark import Bar, Benchmark, Request, Scale, compare_rates
from benchmarks.setting.peer_process import PeerProcess
from benchmarks.setting.recipe import RunningRecipe, first_batches, recipe_config, start
from benchmarks.setting.timing import interleave
from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.item_table import ItemTable
from data_streams.semantic_ids import SemanticIdTable
from models.tables import hash_ids
from models.tiger import Tiger, all_prefixes

BENCHMARK = Benchmark(
    unit="real tokens/s",
    bars=(Bar(key="ratio", at_least=3.0), Bar(key="bidirectional_ratio", at_least=1.0)),
    threads_per_rank=2,
)
RECIPE = "tiger-amazon"
ROUNDS = {"full": 2, "small": 1}
MODELS: dict[Scale, Tiger.Config] = {
    "full": Tiger.Config(),
    "small": Tiger.Config(width=16, num_encoder_blocks=1, num_decoder_blocks=1, num_heads=2, head_width=8),
}
CODES = {"full": (256, 256, 256, 20), "small": (8, 8, 8, 8)}
PEER_ROWS = {"full": 256, "small": 32}
"""Prefixes in a step of the peer, as published; it takes as many steps as our step has prefixes for."""
PEERS = {
    f"{padding} {precision}": {"trimmed": padding == "trimmed", "precision": precision}
    for padding in ("padded", "trimmed")
    for precision in ("float32", "bfloat16")
}


def measure(process: Process, request: Request) -> dict[str, Any]:
    """One round trains on every prefix of the users of a step; the published sizes on both sides.

    Real tokens are those of the prefixes and their targets, the same number on all sides: a causal encoder computes
    those that prefixes share once, and gets the credit for all.
    """
    scale = request.scale
    ours = {
        encoder: _start(process, request, replace(MODELS[scale], encoder=encoder))
        for encoder in ("causal", "bidirectional")
    }
    (batch,) = first_batches(ours["causal"].stream, 1)
    num_levels = len(CODES[scale])
    prefix_items = int((batch.items.places() + 1).sum())
    num_tokens = batch.num_tokens * (1 + num_levels) + prefix_items * num_levels
    folder = Path(request.scratch)
    _write_for_peer(folder, ours["causal"], batch, scale)
    peer = PeerProcess("benchmarks.peers.padded_t5", folder, torch.get_num_threads())
    peer_cpu_s: dict[str, list[float]] = {name: [] for name in PEERS}
    sides: dict[str, Callable[[], object]] = {
        encoder: lambda recipe=recipe: recipe.take_steps([batch]) for encoder, recipe in ours.items()
    }
    for name, options in PEERS.items():
        sides[name] = lambda name=name, options=options: peer_cpu_s[name].append(peer.ask(**options)["cpu_s"])
    timings = interleave(process, sides, rounds=ROUNDS[scale])
    num_weights = {"peer": peer.ask(trimmed=True, precision="float32")["num_weights"]}
    num_weights["ours"] = sum(weight.numel() for weight in ours["causal"].assembly.model.parameters())
    peer.close()
    for name, cpu_s in peer_cpu_s.items():
        timings[name].cpu_s = cpu_s[1:]
    padded, trimmed = (_quickest(timings, padding) for padding in ("padded", "trimmed"))
    best_s = {name: timing.best_s for name, timing in timings.items()}
    return {
        **compare_rates(num_tokens, timings["causal"], timings[padded]),
        "peer_precision": padded,
        "bidirectional_ratio": best_s[padded] / best_s["bidirectional"],
        "ratio_to_trimmed_peer": best_s[trimmed] / best_s["causal"],
        "bidirectional_ratio_to_trimmed_peer": best_s[trimmed] / best_s["bidirectional"],
        "targets_per_s": {name: batch.num_tokens / seconds for name, seconds in best_s.items()},
        "real_tokens": num_tokens,
        "targets": batch.num_tokens,
        "num_weights": num_weights,
    }


def _quickest(timings: dict[str, Any], padding: str) -> str:
    return min((name for name in PEERS if name.startswith(padding)), key=lambda name: timings[name].best_s)


def _start(process: Process, request: Request, model: Tiger.Config) -> RunningRecipe:
    config = recipe_config(request.data, RECIPE)
    table = _random_table(request)
    data = replace(config.data, semantic_ids=table, tokens_per_step=2 * PEER_ROWS[request.scale])
    return start(process, replace(config, model=model, data=data))


def _random_table(request: Request) -> str:
    folder, sizes = Path(request.scratch) / "ids", CODES[request.scale]
    items = ItemTable.load(request.data).item_ids
    random = np.random.default_rng(0)
    codes = np.stack([random.integers(size, size=len(items)) for size in sizes], axis=1).astype(np.int32)
    SemanticIdTable(item_ids=items, codes=codes, code_sizes=sizes).save(str(folder))
    return str(folder)


def _write_for_peer(folder: Path, recipe: RunningRecipe, batch: SequenceBatch, scale: Scale) -> None:
    """Prefixes as rows of tokens: the user's, then those of all codes, level after level in one vocabulary."""
    model = MODELS[scale]
    sizes: Sequence[int] = recipe.assembly.semantic_ids.code_sizes
    starts = torch.tensor([0, *np.cumsum(sizes)[:-1].tolist()])
    tokens = 1 + starts + recipe.assembly.model.item_codes
    prefixes = all_prefixes(batch.items)
    users = 1 + sum(sizes) + hash_ids(batch.user_ids[batch.items.row_index()], model.user_tokens)
    shape = {
        "vocabulary": 1 + sum(sizes) + model.user_tokens,
        "max_length": 1 + recipe.config.data.max_length * len(sizes),
        "width": model.width,
        "num_encoder_blocks": model.num_encoder_blocks,
        "num_decoder_blocks": model.num_decoder_blocks,
        "num_heads": model.num_heads,
        "head_width": model.head_width,
        "feedforward_width": model.feedforward_width,
        "dropout": model.dropout,
        "rows": PEER_ROWS[scale],
    }
    (folder / "shape.json").write_text(json.dumps(shape))
    inputs = {
        "users": users,
        "codes": tokens[prefixes.values].flatten(),
        "lengths": (batch.items.places() + 1) * len(sizes),
        "targets": tokens[batch.targets],
    }
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, folder / "inputs.safetensors")
