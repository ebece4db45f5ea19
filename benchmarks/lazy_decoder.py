"""A training step of OneRec-V2 against one of an encoder-decoder of equal size on the same users."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.experiments.onerec_flops import encoder_decoder
from benchmarks.setting.benchmark import Bar, Benchmark, Request, compare_rates
from benchmarks.setting.flops import build_on_meta, made_up_batch, training_flops
from benchmarks.setting.timing import interleave
from cluster.process import Process
from models.layers.feedforward import FeedForwardConfig
from models.layers.user_context import ContextConfig
from models.onerec import OneRec
from models.onerec_v2 import OneRecV2
from models.recommender import StepContext
from models.semantic_ids import SemanticIds
from models.tables import LookedUp
from trainer.dense_module import resolve_precision

BENCHMARK = Benchmark(
    unit="users/s",
    bars=(Bar(key="least_of_flops", at_least=0.5), Bar(key="most_of_flops", at_most=2.0)),
    threads_per_rank=2,
    on_accelerator=True,
)
CONTEXTS = {"full": (128, 512, 2048), "small": (8, 16), "accelerator": (128, 512, 2048)}
EVENTS = {"full": 2**15, "small": 32, "accelerator": 2**17}
"""Of all users of a step."""
ROUNDS = {"full": 3, "small": 1, "accelerator": 10}
WIDTH = {"full": 256, "small": 16, "accelerator": 1024}
CODE_SIZES = (256,) * 3
NUM_ITEMS = 1000


def measure(process: Process, request: Request) -> dict[str, Any]:
    """Users have equally many events and one target each. The case in which we gain least is the headline; how the
    ratio of times follows that of FLOPs is told by the least and the largest of ratio / FLOP ratio.

    A step has as many events at every context, so the shorter the context, the more users: batches are filled by
    events, as in training, and what a step costs whatever its size (weights that are cast, their gradients) weighs
    alike.
    """
    scale, cases, sides = request.scale, {}, {}
    users = {context: EVENTS[scale] // context for context in CONTEXTS[scale]}
    lazy = lazy_config(WIDTH[scale])
    configs = {"ours": lazy, "peer": encoder_decoder(lazy)}
    precision = resolve_precision("auto", process.device)
    for context in CONTEXTS[scale]:
        for name, config in configs.items():
            sides[f"{name} {context}"] = _step(config, users[context], context, process.device, precision)
    timings = interleave(process, sides, rounds=ROUNDS[scale])
    for context in CONTEXTS[scale]:
        ours, peer = (timings[f"{name} {context}"] for name in configs)
        flops = {name: _flops(config, users[context], context) for name, config in configs.items()}
        compared = compare_rates(users[context], ours, peer)
        wanted = flops["peer"] / flops["ours"]
        cases[str(context)] = {
            **compared,
            "gigaflops": {name: count / 1e9 for name, count in flops.items()},
            "flop_ratio": wanted,
            "of_flops": compared["ratio"] / wanted,
        }
    least = min(cases.values(), key=lambda case: case["ratio"])
    shares = [case["of_flops"] for case in cases.values()]
    return {
        **{key: least[key] for key in ("ours", "peer", "ratio", "cpu_seconds", "rounds_s")},
        "least_of_flops": min(shares),
        "most_of_flops": max(shares),
        "our_precision": str(precision).removeprefix("torch."),
        "cases": cases,
    }


def lazy_config(width: int) -> OneRecV2.Config:
    return OneRecV2.Config(
        width=width,
        num_blocks=4,
        num_heads=4,
        feedforward=FeedForwardConfig(hidden=4 * width),
        context=ContextConfig(hidden=32, row_width=32, item_codes=False),
        targets_per_user=1,
        dropout=0.0,
    )


def _flops(config: OneRecV2.Config | OneRec.Config, users: int, context: int) -> int:
    model = build_on_meta(config, code_sizes=CODE_SIZES, max_length=context, num_items=NUM_ITEMS)
    return training_flops(model, made_up_batch([context] * users))


def _step(
    config: OneRecV2.Config | OneRec.Config,
    users: int,
    context: int,
    device: torch.device,
    precision: torch.dtype,
) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(CODE_SIZES[0], (NUM_ITEMS, len(CODE_SIZES)), generator=generator)
    with device:
        model = config.build(
            num_items=NUM_ITEMS,
            max_length=context,
            item_feature_dim=0,
            semantic_ids=SemanticIds(codes=codes.to(device), code_sizes=CODE_SIZES),
        )
    step = StepContext(step=0)
    batch = model.training_batch(made_up_batch([context] * users), step).to(device)
    dim = model.tables()[0].dim
    vectors = torch.randn(users * context, dim, generator=generator).to(device)

    def run() -> None:
        rows = {"history": LookedUp(ids=batch.items.values, rows=vectors.clone().requires_grad_())}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = model(rows, batch, step)
        loss.sum.backward()
        model.zero_grad()

    return run
