"""OneRec and OneRec-V2 beside TIGER and the decoder-only model: `python -m benchmarks.experiments.onerec --help`.

All are trained for equally many floating-point operations: those of some epochs of the decoder-only model, counted on
the recipe's own first steps, forward and backward; experts as the dense layer of the size that a token visits.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import polars as pl
import tyro
from matplotlib.figure import Figure

from benchmarks.setting.commands import (
    evaluated_users,
    folder_name,
    option_words,
    pretrain_once,
    require_known,
    run_experiment,
    words_of_steps,
)
from benchmarks.setting.flops import META, dense_of_active_size, training_flops
from benchmarks.setting.paired import CHANGE_HEAD, change_cells, paired_change
from benchmarks.setting.recipe import first_batches
from benchmarks.setting.report import Table, draw_points, mean_cells, write_tables
from data_streams.item_table import ItemTable
from data_streams.stream import TrainStream
from launch.commands.pretrain import parse_config
from models.recommender import Recommender, StepContext
from trainer.assembly import build_model, load_item_features, load_semantic_ids
from trainer.configuration import PretrainConfig

DECODER, TIGER, ONEREC, LAZY = "decoder-only", "TIGER", "OneRec", "OneRec-V2"
EXPERTS, OWN_KEYS = "experts", "keys for each block"
EIGHT_EXPERTS = {"num-experts": "8", "top-k": "2"}
COUNTED_STEPS = 8
METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
COMPARED = ("recall@10", "ndcg@10")


@dataclass(frozen=True, kw_only=True)
class Variant:
    recipe: str
    words: tuple[str, ...] = ()
    experts: tuple[str, int] | None = None
    """The part of the model whose dense layer eight experts replace, two for a token, and the size of one expert."""
    against: str = DECODER
    """What it is compared with."""

    def arguments(self) -> list[str]:
        """Options of `grail pretrain`, which must stand behind all others."""
        if self.experts is None:
            return list(self.words)
        part, hidden = self.experts
        given = {**EIGHT_EXPERTS, "hidden": str(hidden)}
        options = [word for name, value in given.items() for word in (f"--model.{part}.{name}", value)]
        return [*self.words, f"model.{part}:mixture-config", *options]


AMAZON = {
    DECODER: Variant(recipe="decoder-amazon"),
    TIGER: Variant(recipe="tiger-amazon"),
    ONEREC: Variant(recipe="onerec-amazon"),
    f"{ONEREC}, {EXPERTS}": Variant(
        recipe="onerec-amazon", experts=("decoder-feedforward", 192), against=ONEREC
    ),
    LAZY: Variant(recipe="onerec-v2-amazon"),
    f"{LAZY}, {EXPERTS}": Variant(
        recipe="onerec-v2-amazon",
        words=("--model.num-dense-blocks", "1"),
        experts=("feedforward", 256),
        against=LAZY,
    ),
    f"{LAZY}, {OWN_KEYS}": Variant(recipe="onerec-v2-amazon", words=("--model.kv-layers", "4"), against=LAZY),
}
_POINTS = ("--model.session.items", "1", "--model.session.watched-s", "0")
_LONG = ("--data.max-length", "100", "--model.width", "64", "--model.feedforward-width", "176")
WORLD = {
    DECODER: Variant(
        recipe="decoder-amazon", words=(*_LONG, "--data.tokens-per-step", "4096", "--model.dropout", "0.1")
    ),
    TIGER: Variant(
        recipe="tiger-amazon", words=(*_LONG, "--data.tokens-per-step", "1024", "--model.head-width", "16")
    ),
    ONEREC: Variant(
        recipe="onerec-world",
        words=(
            *_POINTS,
            "model.decoder-feedforward:feed-forward-config",
            "--model.decoder-feedforward.hidden",
            "176",
        ),
    ),
    f"{ONEREC}, {EXPERTS}": Variant(recipe="onerec-world", words=_POINTS, against=ONEREC),
    LAZY: Variant(recipe="onerec-v2-world"),
    f"{LAZY}, {EXPERTS}": Variant(
        recipe="onerec-v2-world",
        words=("--model.num-dense-blocks", "1", "--model.dense-feedforward.hidden", "176"),
        experts=("feedforward", 88),
        against=LAZY,
    ),
    f"{LAZY}, {OWN_KEYS}": Variant(recipe="onerec-v2-world", words=("--model.kv-layers", "3"), against=LAZY),
}
VARIANTS = {"amazon": AMAZON, "world": WORLD}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train and evaluate once per variant and seed; finished runs are not repeated."""

    data: str
    """Shards of `grail data build`."""
    ids: str
    """Semantic IDs of its items."""
    sizes: Literal["amazon", "world"] = "amazon"
    """Recipes at the size of the Amazon sets, or of the world with its longer histories and play times."""
    out: str = "runs/onerec-parts"
    """Folder of the runs, of table.md and of picture.png."""
    variants: tuple[str, ...] = ()
    """Variants to compare; left out, all. The decoder-only model is always among them."""
    epochs: int = 3
    """Of the decoder-only model; the others are trained for as many operations."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each variant."""
    extra: tuple[str, ...] = ()
    """Further options of all training runs as NAME=VALUE or NAME, such as cluster.workers=1."""

    def __post_init__(self) -> None:
        require_known("--variants", self.variants, VARIANTS[self.sizes])

    def chosen(self) -> dict[str, Variant]:
        """The decoder-only model first."""
        known = VARIANTS[self.sizes]
        return {name: known[name] for name in known if name in (*(self.variants or known), DECODER)}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a variant is made of and takes."""

    parameters: int
    """Of the dense part, without tables of rows."""
    active: int
    """Those that a token visits."""
    step_flops: float
    steps_per_epoch: int

    def steps(self, flops: float) -> int:
        """As many as take so many operations."""
        return max(round(flops / self.step_flops), 1)


def main(arguments: list[str]) -> None:
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.experiments.onerec")
    costs = {name: _cost(_config(options, variant)) for name, variant in options.chosen().items()}
    budget = options.epochs * costs[DECODER].steps_per_epoch * costs[DECODER].step_flops
    found: dict[str, list[pl.DataFrame]] = {}
    for seed in options.seeds:
        for name, variant in options.chosen().items():
            users = _trained(options, name, variant, seed, costs[name], budget)
            found.setdefault(name, []).append(users)
            _write(options, found, costs, budget)


def _words(options: Options) -> list[str]:
    return ["--data.path", options.data, "--data.semantic-ids", options.ids, *option_words(options.extra)]


def _config(options: Options, variant: Variant) -> PretrainConfig:
    return parse_config(variant.recipe, [*_words(options), *variant.arguments()])


def _cost(config: PretrainConfig) -> Cost:
    stream = TrainStream(config.data, seed=config.seed, rank=0, world_size=1)
    batches = first_batches(stream, COUNTED_STEPS)
    active = _build(replace(config, model=dense_of_active_size(config.model)))
    # What it keeps on the host for later batches is made of codes, which the meta device does not have.
    active.training_batch(batches[0], StepContext(step=0))
    active.to(META)
    return Cost(
        parameters=_count(_build(config)),
        active=_count(active),
        step_flops=sum(training_flops(active, batch) for batch in batches) / len(batches),
        steps_per_epoch=stream.steps_per_epoch(),
    )


def _build(config: PretrainConfig) -> Recommender:
    items = ItemTable.load(config.data.path)
    return build_model(config, items, load_item_features(config, items), load_semantic_ids(config, items))


def _count(model: Recommender) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _trained(
    options: Options, name: str, variant: Variant, seed: int, cost: Cost, budget: float
) -> pl.DataFrame:
    steps = cost.steps(budget)
    words = [*_words(options), "--seed", str(seed), *words_of_steps(steps)]
    words += ["--train.validate-every-steps", str(steps)]
    run_dir = Path(options.out) / f"{folder_name(name)}-{seed}"
    pretrain_once(run_dir, variant.recipe, *words, *variant.arguments())
    return evaluated_users(run_dir, "test", "--evaluation.cutoffs", "5", "10")


def _write(
    options: Options, found: dict[str, list[pl.DataFrame]], costs: dict[str, Cost], budget: float
) -> None:
    """Means over seeds; what experts and keys change, user by user; and the picture."""
    head = ["variant", "seeds", *METRICS, "parameters (a token visits)", "GFLOPs a step", "steps", "epochs"]
    rows = []
    for name, runs in found.items():
        cost = costs[name]
        steps = cost.steps(budget)
        size = f"{cost.parameters / 1e6:.2f} M ({cost.active / 1e6:.2f} M)"
        spent = [f"{cost.step_flops / 1e9:.1f}", f"{steps:,}", f"{steps / cost.steps_per_epoch:.1f}"]
        rows.append([name, str(len(runs)), *mean_cells(runs, METRICS), size, *spent])
    folder = Path(options.out)
    write_tables(folder, Table(head, rows), Table(CHANGE_HEAD, compared(found, options)))
    figure = Figure(figsize=(8, 1 + 0.6 * len(found)), layout="constrained")
    draw_points(figure.subplots(), found, "recall@10")
    figure.savefig(folder / "picture.png", dpi=120)


def compared(found: dict[str, list[pl.DataFrame]], options: Options) -> list[list[str]]:
    """Each variant with what it is a variant of, over the seeds that both have."""
    rows = []
    for name, runs in found.items():
        before = VARIANTS[options.sizes][name].against
        if name == DECODER or before not in found:
            continue
        seeds = min(len(runs), len(found[before]))
        for metric in COMPARED:
            change = paired_change(runs[:seeds], found[before][:seeds], metric)
            rows.append(change_cells(before, name, metric, seeds, change))
    return rows


if __name__ == "__main__":
    sys.exit(run_experiment(main))
