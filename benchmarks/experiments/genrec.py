"""What GenRec's parts bring: `python -m benchmarks.experiments.genrec --help`.

Page-wise against point-wise training for equally many supervised tokens, each with and without the token merger.
"""

import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import polars as pl
import tyro
from matplotlib.figure import Figure

from benchmarks.setting.commands import (
    evaluated_users,
    option_words,
    pretrain_once,
    run_experiment,
    words_of_steps,
)
from benchmarks.setting.paired import CHANGE_HEAD, change_cells, paired_change
from benchmarks.setting.report import Table, draw_points, mean_cells, write_tables
from cluster.errors import ConfigError
from data_streams.batch import CLICKED, SequenceBatch
from data_streams.configuration import DataConfig
from data_streams.semantic_ids import SemanticIdTable
from data_streams.stream import TrainStream
from launch.run_directory import load_config
from trainer.metric_log import read_metrics

TARGETS = {
    "page": ("--model.target", "page"),
    "item": ("--model.target", "item"),
    "next": ("--model.target", "item", "--data.pages", "none"),
}
MERGERS = {"on": ("--model.merge",), "off": ("--model.no-merge",)}
METRICS = ("recall@10", "ndcg@10")
LOSS = 0.03
"""Share of a metric that the merger must not cost."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train and evaluate once per target, merger and seed; finished runs are not repeated."""

    data: str
    """Shards of `grail data build`; of the world, with its pages."""
    ids: str
    """Semantic IDs of its items."""
    recipe: str = "genrec"
    """genrec, or genrec-amazon for the Amazon sets."""
    out: str = "runs/genrec-parts"
    """Folder of the runs, of table.md and of picture.png."""
    targets: tuple[str, ...] = ("page", "item")
    """What is learnt: page (list-wise), item (every chosen item of a page by itself), next (the item after each event,
    without pages). The first is trained for all epochs, the others for as many supervised tokens."""
    mergers: tuple[str, ...] = ("on", "off")
    """With and without the token merger."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each variant."""
    extra: tuple[str, ...] = ()
    """Further options of all training runs as NAME=VALUE or NAME, such as train.epochs=4."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.targets if name not in TARGETS]
        unknown += [name for name in self.mergers if name not in MERGERS]
        if unknown or not (self.targets and self.mergers) or self.targets[0] == "next":
            raise ConfigError(
                f"targets must be of {list(TARGETS)}, next not first, and mergers of {list(MERGERS)}; got "
                f"{self.targets} and {self.mergers}"
            )


@dataclass(frozen=True, order=True)
class Variant:
    target: str
    merger: str

    def __str__(self) -> str:
        return f"{self.target}-wise, merger {self.merger}"


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """What an epoch of training shows a model."""

    tokens_per_step: float
    """Codes and ends of pages that are learnt in a step."""
    events_per_user: float
    """Events of the history behind which all targets of a user stand."""


@dataclass(frozen=True, kw_only=True)
class Result:
    users: pl.DataFrame
    steps: int
    training_s: float
    """Seconds of steps, without start-up, validation and evaluation."""


def main(arguments: list[str]) -> None:
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.experiments.genrec")
    first, found = options.targets[0], {}
    shown: dict[str, Supervision] = {}
    for seed in options.seeds:
        budget = 0
        for target, merger in product(options.targets, options.mergers):
            variant = Variant(target, merger)
            steps = None if target == first else equal_steps(budget, shown[first], shown[target])
            run_dir = _trained(options, variant, seed, steps)
            shown = shown or {name: _supervision(run_dir, name) for name in options.targets}
            found.setdefault(variant, []).append(_result(run_dir))
            budget = budget or found[variant][-1].steps
            _write(options, found, shown)


def equal_steps(steps: int, of: Supervision, wanted: Supervision) -> int:
    """Steps in which one way of training sees as many supervised tokens as another in its own."""
    return max(round(steps * of.tokens_per_step / wanted.tokens_per_step), 1)


def _trained(options: Options, variant: Variant, seed: int, steps: int | None) -> Path:
    """`steps`, where they are given, count instead of epochs."""
    given = ["--data.path", options.data, "--data.semantic-ids", options.ids, "--seed", str(seed)]
    given += [*TARGETS[variant.target], *MERGERS[variant.merger], *option_words(options.extra)]
    if steps is not None:
        given += words_of_steps(steps)
    run_dir = Path(options.out) / f"{variant.target}-merger-{variant.merger}-{seed}"
    return pretrain_once(run_dir, options.recipe, *given)


def _result(run_dir: Path) -> Result:
    users = evaluated_users(run_dir, "test", "--evaluation.cutoffs", "10")
    lines = read_metrics(str(run_dir))
    step_s = [line["train/step_s"] for line in lines if "train/step_s" in line]
    steps = int(lines[-1]["step"])
    training_s = steps * sum(step_s) / len(step_s) if step_s else float("nan")
    return Result(users=users, steps=steps, training_s=training_s)


def _supervision(run_dir: Path, target: str) -> Supervision:
    """Counted over one epoch of the run's data, read by a single worker; steps have the same users at any number."""
    config = load_config(str(run_dir))
    data: DataConfig = replace(config.data, pages="none") if target == "next" else config.data
    num_levels = len(SemanticIdTable.load(data.semantic_ids).code_sizes)
    steps = tokens = users = events = 0
    for batch in TrainStream(data, seed=config.seed, rank=0, world_size=1).batches(0):
        steps += 1
        tokens += supervised_tokens(batch, target, num_levels)
        users += batch.num_users
        events += batch.num_tokens
    return Supervision(tokens_per_step=tokens / steps, events_per_user=events / users)


def supervised_tokens(batch: SequenceBatch, target: str, num_levels: int) -> int:
    """Codes of all items of all pages and an end for each page; or of the chosen items; or of each event's next."""
    if target == "next":
        return num_levels * batch.num_tokens
    if target == "item":
        return num_levels * int((batch.pages.strengths >= CLICKED).sum())
    return num_levels * len(batch.pages.items.values) + batch.pages.num_pages


def _write(options: Options, found: dict[Variant, list[Result]], shown: dict[str, Supervision]) -> None:
    """Means over seeds; what the merger and pages change, user by user; and the picture."""
    num_levels = len(SemanticIdTable.load(options.ids).code_sizes)
    head = [
        "variant",
        "seeds",
        *METRICS,
        "steps",
        "supervised tokens",
        "prompt tokens per user",
        "training s",
    ]
    rows = []
    for variant, results in sorted(found.items()):
        seen, steps = shown[variant.target], sum(result.steps for result in results) / len(results)
        per_item = 1 if variant.merger == "on" else num_levels
        rows.append(
            [
                *(str(variant), str(len(results))),
                *mean_cells([result.users for result in results], METRICS),
                *(f"{steps:,.0f}", f"{steps * seen.tokens_per_step:,.0f}"),
                f"{seen.events_per_user * per_item:.1f}",
                f"{sum(result.training_s for result in results) / len(results):.0f}",
            ]
        )
    frames = {variant: [result.users for result in results] for variant, results in found.items()}
    folder = Path(options.out)
    write_tables(folder, Table(head, rows), Table(*compared(frames, options.targets[0])))
    figure = Figure(figsize=(8, 1 + 0.6 * len(found)), layout="constrained")
    draw_points(figure.subplots(), {str(variant): runs for variant, runs in frames.items()}, "recall@10")
    figure.savefig(folder / "picture.png", dpi=120)


def compared(
    frames: dict[Variant, list[pl.DataFrame]], first_target: str
) -> tuple[list[str], list[list[str]]]:
    """Head and rows: merger off -> on for each target, and other targets -> the first; over the seeds both have."""
    pairs = [(Variant(variant.target, "off"), variant) for variant in frames if variant.merger == "on"]
    pairs += [
        (variant, Variant(first_target, variant.merger))
        for variant in frames
        if variant.target != first_target
    ]
    rows = []
    for before, after in pairs:
        seeds = min(len(frames.get(before, ())), len(frames.get(after, ())))
        for metric in METRICS if seeds else ():
            change = paired_change(frames[after][:seeds], frames[before][:seeds], metric)
            excluded = "yes" if change.excludes_loss(LOSS) else "no"
            rows.append([*change_cells(before, after, metric, seeds, change), excluded])
    return [*CHANGE_HEAD, f"excludes a loss of {LOSS:.0%}"], rows


if __name__ == "__main__":
    sys.exit(run_experiment(main))
