"""Constrained beam search against `generate` of Hugging Face with `prefix_allowed_tokens_fn`, with equal weights."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.setting.benchmark import Bar, Benchmark, Request, Scale, compare_rates
from benchmarks.setting.peer_process import PeerProcess
from benchmarks.setting.small_gpt import GPTShape, SmallGPT, random_weights
from benchmarks.setting.timing import interleave
from cluster.process import Process
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.decoding.beam_search import BeamSearch
from models.decoding.search import Decoded
from models.decoding.space import CatalogueSpace
from models.decoding.trie import PrefixTrie

BENCHMARK = Benchmark(
    unit="users/s",
    bars=(Bar(key="ratio", at_least=5.0), Bar(key="equal_places", at_least=1.0)),
    threads_per_rank=2,
)
ROUNDS = {"full": 3, "small": 1}
USERS = {"full": 16, "small": 2}
PROMPT = {"full": 128, "small": 8}
ITEMS = {"full": 10_000, "small": 300}
BEAMS = {"full": (16, 50), "small": (4, 8)}
SHAPE: dict[Scale, GPTShape] = {
    "full": GPTShape(max_positions=1024 + 3),
    "small": GPTShape(width=32, num_layers=2, num_heads=4, max_positions=32),
}
CURVES: dict[Scale, dict[str, tuple[int, ...]]] = {
    "full": {
        "beams": (8, 16, 32, 64, 128, 256),
        "users": (1, 4, 16, 64),
        "prompt": (16, 64, 256, 1024),
        "items": (1_000, 10_000, 100_000, 1_000_000),
    },
    "small": {"beams": (4, 8), "users": (1, 4), "prompt": (8, 16), "items": (300, 600)},
}
TIE = 1e-4
"""Items whose log-probabilities differ by less are tied: two libraries round differently."""


def measure(process: Process, request: Request) -> dict[str, Any]:
    """One round searches for a batch of users, from their prompts to items; the least ratio of all widths counts."""
    scale = request.scale
    shape = SHAPE[scale]
    weights, codes = random_weights(shape), _codes(shape, ITEMS[scale])
    batch = _users(shape, USERS[scale], PROMPT[scale])
    model, space = SmallGPT(shape, weights), CatalogueSpace(PrefixTrie.build(codes, (shape.num_codes,) * 3))
    folder = Path(request.scratch)
    _write_for_peer(folder, shape, weights, codes, batch)
    peer = PeerProcess("benchmarks.peers.hugging_face_beams", folder, torch.get_num_threads())
    peer_cpu_s: dict[int, list[float]] = {beams: [] for beams in BEAMS[scale]}
    sides = {}
    for beams in BEAMS[scale]:
        sides[f"ours {beams}"] = lambda beams=beams: _search(model, batch, space, beams)
        sides[f"peer {beams}"] = lambda beams=beams: peer_cpu_s[beams].append(
            peer.ask(beams=beams, tell=False)["cpu_s"]
        )
    timings = interleave(process, sides, rounds=ROUNDS[scale])
    by_beams, equal_places = {}, 1.0
    for beams in BEAMS[scale]:
        timings[f"peer {beams}"].cpu_s = peer_cpu_s[beams][1:]
        by_beams[str(beams)] = compare_rates(
            batch.num_users, timings[f"ours {beams}"], timings[f"peer {beams}"]
        )
        found = _search(model, batch, space, beams)
        equal_places = min(equal_places, _equal_places(found, peer.ask(beams=beams, tell=True)))
    peer.close()
    least = min(by_beams.values(), key=lambda result: result["ratio"])
    return {
        **least,
        "equal_places": equal_places,
        "by_beams": by_beams,
        "curves": {name: {"ours": _curve(name, scale)} for name in CURVES[scale]},
    }


def _search(model: SmallGPT, batch: SequenceBatch, space: CatalogueSpace, beams: int) -> Decoded:
    return BeamSearch.Config(width=beams).build().search(model, {}, batch, space, k=beams)


def _codes(shape: GPTShape, num_items: int) -> Tensor:
    """Different random paths, one per item."""
    generator = torch.Generator().manual_seed(1)
    num_paths = shape.num_codes**shape.num_levels
    drawn = torch.randint(num_paths, (num_items + num_items // 5,), generator=generator).unique()
    paths = drawn[torch.randperm(len(drawn), generator=generator)[:num_items]]
    sizes = [shape.num_codes**level for level in reversed(range(shape.num_levels))]
    return torch.stack([paths // size % shape.num_codes for size in sizes], dim=1)


def _users(shape: GPTShape, num_users: int, length: int) -> SequenceBatch:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(shape.num_codes, (num_users * length,), generator=generator)
    lengths = torch.full((num_users,), length)
    return SequenceBatch(user_ids=torch.arange(num_users), items=Jagged.from_lengths(tokens, lengths))


def _write_for_peer(
    folder: Path, shape: GPTShape, weights: dict[str, Tensor], codes: Tensor, batch: SequenceBatch
) -> None:
    prompts = batch.items.values.view(batch.num_users, -1)
    (folder / "shape.json").write_text(json.dumps(asdict(shape)))
    save_file(weights, folder / "weights.safetensors")
    save_file({"codes": codes.contiguous(), "prompts": prompts.contiguous()}, folder / "inputs.safetensors")


def _equal_places(found: Decoded, told: dict[str, Any]) -> float:
    """Share of places with the same path on both sides, or with one that is tied with it."""
    paths, log_probs = torch.tensor(told["paths"]), torch.tensor(told["log_probs"])
    is_tied = (found.log_probs - log_probs).abs() < TIE
    same_set = torch.equal(_sorted_paths(found.paths), _sorted_paths(paths))
    is_equal = (found.paths == paths).all(-1) | (is_tied & same_set)
    return is_equal.float().mean().item()


def _sorted_paths(paths: Tensor) -> Tensor:
    return (paths[..., 0] * 10**8 + paths[..., 1] * 10**4 + paths[..., 2]).sort(dim=1).values


def _curve(varied: str, scale: Scale) -> dict[str, float]:
    """Seconds of the quickest of three searches, with one size varied and the others as compared above."""
    seconds = {}
    for value in CURVES[scale][varied]:
        sizes = {
            "beams": BEAMS[scale][-1],
            "users": USERS[scale],
            "prompt": PROMPT[scale],
            "items": ITEMS[scale],
        } | {varied: value}
        shape = replace(SHAPE[scale], max_positions=sizes["prompt"] + SHAPE[scale].num_levels)
        model = SmallGPT(shape, random_weights(shape))
        codes = _codes(shape, sizes["items"])
        space = CatalogueSpace(PrefixTrie.build(codes, (shape.num_codes,) * shape.num_levels))
        batch = _users(shape, sizes["users"], sizes["prompt"])
        times = []
        for _ in range(3):
            started = time.perf_counter()
            _search(model, batch, space, sizes["beams"])
            times.append(time.perf_counter() - started)
        seconds[str(value)] = min(times)
    return seconds
