"""Build a synthetic world, pretrain, recommend, and align a generator by rewards: grail demo [--scale small]"""

import dataclasses
import json
import time
from dataclasses import dataclass
from typing import Any, Literal

from cluster.configuration import ClusterConfig
from cluster.logs import duration
from cluster.storage import Storage
from launch.options import parse
from launch.run_directory import ALIGNMENT_CURVES, CURVES, absolute
from trainer.configuration import PretrainConfig

WORLDS: dict[str, dict[str, Any]] = {
    "small": {"num_users": 800, "num_items": 600, "num_clusters": 20, "mean_clicks": 25.0},
    "full": {},
}
EPOCHS = {"small": 4, "full": 12}
LOG_EVERY_STEPS = {"small": 3, "full": 20}


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Build a synthetic world, pretrain, recommend, and align a generator by rewards."""

    scale: Literal["small", "full"] = "full"
    """small is over in two or three minutes; full learns something worth looking at."""
    out: str = "runs/demo"
    """Folder for the data set and the run; an interrupted demo goes on there."""
    workers: int = 2
    """Training processes the item table is sharded over."""
    seed: int = 0
    """Seed of the world and of the training."""


def run(arguments: list[str]) -> int:
    options = parse(DemoOptions, arguments, program="grail demo")
    return demo(options)


def demo(options: DemoOptions) -> int:
    """The commands of a first day, one after another."""
    from launch.commands import evaluate, pretrain, recommend
    from launch.demo_alignment import AlignmentDemo

    begun, out = time.monotonic(), absolute(options.out)
    _heading("1 of 7", "a world of users with drifting tastes, written as tar shards")
    _build_world(options, f"{out}/shards")
    config = demo_config(options, f"{out}/shards", f"{out}/run")
    _heading("2 of 7", f"{options.workers} workers train SASRec; the item table is sharded over them")
    code = pretrain.train(config)
    if code:
        return code
    _heading(
        "3 of 7", "every user's last click is ranked among all items, beside simple methods and the truth"
    )
    found = evaluate.evaluate(config, baselines=True)
    _heading("4 of 7", "what three users would be shown")
    recommend.show(config, num_users=3)
    aligned = AlignmentDemo(out=out, seed=options.seed, scale=options.scale)
    _heading(
        "5 of 7",
        "items get semantic IDs, a generator that writes them, and two models (answers, PRM) to reward it",
    )
    aligned.build_pages(_world(options), options.workers)
    aligned.tokenize()
    if code := aligned.pretrain():
        return code
    _heading("6 of 7", "alignment (GRPO-SR): a worker draws, another rewards, a learner updates")
    if code := aligned.align():
        return code
    _heading("7 of 7", "the generator before and after, beside the truth of the world")
    _summary(out, found, aligned.evaluate(), time.monotonic() - begun)
    return 0


def demo_config(options: DemoOptions, data: str, run_dir: str) -> PretrainConfig:
    from launch.commands.pretrain import parse_config

    config = parse_config("sasrec", ["--data.path", data, "--run-dir", run_dir, "--seed", str(options.seed)])
    return dataclasses.replace(
        config,
        cluster=ClusterConfig(workers=options.workers),
        train=dataclasses.replace(config.train, epochs=EPOCHS[options.scale], checkpoint_every_s=10.0),
        log=dataclasses.replace(config.log, every_steps=LOG_EVERY_STEPS[options.scale]),
    )


def _build_world(options: DemoOptions, path: str) -> None:
    from data_streams.build import BuildConfig, build
    from data_streams.inspect import inspect, print_report
    from data_streams.manifest import MANIFEST_NAME

    if Storage(path).exists(MANIFEST_NAME):
        print(f"{path} is there already and is used again.")
        return
    build(_world(options), BuildConfig(out=path, cluster=ClusterConfig(workers=options.workers)))
    print_report(inspect(path, num_samples=2))


def _world(options: DemoOptions) -> Any:
    from data_streams.sources.world import WorldSource

    return WorldSource.Config(seed=options.seed, **WORLDS[options.scale])


def _heading(place: str, text: str) -> None:
    from rich.console import Console

    Console().rule(f"[bold]{place}[/bold]  {text}", align="left")


def _summary(out: str, found: dict[str, Any], generator: dict[str, dict[str, float]], seconds: float) -> None:
    others = {name: round(metrics["ndcg@10"], 4) for name, metrics in found["baselines"].items()}
    _heading("done", f"in {duration(seconds)}")
    print(f"ndcg@10 of the test clicks: {found['metrics']['ndcg@10']:.4f}; others: {json.dumps(others)}")
    for metric, words in {"utility@10": "true utility (random 0, best 1)", "ndcg@10": "ndcg@10"}.items():
        before, after = (generator[name][metric] for name in ("policy", "aligned"))
        print(
            f"{words} of the generator's lists: {before:.4f} before alignment, {after:.4f} after its last step"
        )
    print(f"Pictures: {out}/shards/inspect.png (the data), {out}/run/{CURVES} (the training),")
    print(f"          {out}/aligned/{ALIGNMENT_CURVES} (the alignment)")
    print(f"Numbers:  {out}/run/metrics.jsonl, {out}/run/evaluation.json")
    print("Train on your own events: grail data build events --events F --items F --out DIR, then")
    print("                          grail pretrain sasrec --data.path DIR --cluster.workers 2")
