"""Every objective on one recipe for the same time: `python -m benchmarks.experiments.objectives --help`."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from benchmarks.setting.commands import evaluated, grail
from benchmarks.setting.ranks import measure_on_ranks
from benchmarks.setting.recipe import RunningRecipe, first_batches, start
from benchmarks.setting.timing import interleave
from cluster.plugins import load_plugin, plugin_config
from cluster.process import Process
from cluster.storage import Storage
from data_streams.manifest import Manifest

OBJECTIVES = {
    "full-softmax": {},
    "sampled-softmax": {"log_q": True, "popularity_share": 0.5},
    "in-batch-softmax": {},
    "gbce": {},
    "bce": {},
    "bpr-max": {},
    "bpr": {},
    "top1-max": {},
    "top1": {},
}
"""Options beside the defaults; scores of the softmax family are cosines over the recipe's temperature."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train and evaluate once per objective, each for about the same time."""

    data: str
    """Shards of `grail data build`."""
    recipe: str
    """Recipe whose objective is replaced."""
    seconds: float = 60.0
    """Training time of each run, without start-up and validation."""
    out: str = "runs/objectives"
    """Folder of the runs."""
    names: tuple[str, ...] = tuple(OBJECTIVES)
    """Objectives to compare."""


def main(arguments: list[str]) -> None:
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.experiments.objectives")
    rows = []
    for name in options.names:
        epochs, rate = _epochs_in(options, name)
        metrics = _train_and_evaluate(options, name, epochs)
        rows.append(
            f"| {name} | {rate:,.0f} | {epochs} | {metrics['recall@10']:.4f} | {metrics['ndcg@10']:.4f} |"
        )
        print(rows[-1], flush=True)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    head = ["| objective | targets/s | epochs | R@10 | N@10 |", "|---|---|---|---|---|"]
    (Path(options.out) / "table.md").write_text("\n".join([*head, *rows]) + "\n")


def _epochs_in(options: Options, name: str) -> tuple[int, float]:
    """How many epochs fit into the time, and the targets per second this was reckoned with."""
    recipe = load_plugin("launch.recipes", options.recipe).recipe()
    cluster = recipe.cluster
    measured = measure_on_ranks(
        _rate, 1, cluster.workers * cluster.cpus_per_worker, options, name, timeout_s=300.0
    )
    counts = Manifest.load(Storage(options.data)).train_length_counts
    longest = recipe.data.max_length
    per_epoch = sum(min(max(length - 1, 0), longest) * users for length, users in counts.items())
    rate = measured["targets_per_s"]
    return max(round(rate * options.seconds / per_epoch), 1), rate


def _rate(process: Process, options: Options, name: str) -> dict[str, float]:
    config = load_plugin("launch.recipes", options.recipe).recipe()
    config = replace(
        config, data=replace(config.data, path=options.data), objective=_objective(name, config.objective)
    )
    running: RunningRecipe = start(process, config)
    batches = first_batches(running.stream, 12)
    timing = interleave(process, {"ours": lambda: running.take_steps(batches)}, rounds=3)["ours"]
    return {"targets_per_s": sum(batch.num_tokens for batch in batches) / timing.best_s}


def _objective(name: str, of_recipe: object) -> object:
    config = plugin_config("models.objectives", name)
    is_softmax = name.endswith("softmax")
    scoring = {"temperature": of_recipe.temperature} if is_softmax else {}
    return config(**scoring, **OBJECTIVES[name])


def _train_and_evaluate(options: Options, name: str, epochs: int) -> dict[str, float]:
    run_dir = Path(options.out) / name
    objective = _objective(name, load_plugin("launch.recipes", options.recipe).recipe().objective)
    given = [f"--objective.temperature={objective.temperature}"]
    for option, value in OBJECTIVES[name].items():
        flag = f"--objective.{option.replace('_', '-')}"
        given.append(flag if value is True else f"{flag}={value}")
    grail(
        "pretrain",
        options.recipe,
        "--data.path",
        options.data,
        "--run-dir",
        str(run_dir),
        "--objective",
        name,
        *given,
        "--train.epochs",
        str(epochs),
    )
    return evaluated(run_dir)["metrics"]


if __name__ == "__main__":
    main(sys.argv[1:])
