"""Every objective on one recipe for the same time: `python -m benchmarks.experiments.objectives --help`.

What a step takes is measured first, in processor time, so that other work on the machine favours none; then each
objective is trained for as many steps as take the time, with the recipe's learning rates and schedule over just those.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.setting.commands import (
    evaluated,
    keep_words,
    option_words,
    pretrain_once,
    require_known,
    run_experiment,
    words_of_steps,
)
from benchmarks.setting.ranks import measure_on_ranks
from benchmarks.setting.recipe import RunningRecipe, first_batches, start
from benchmarks.setting.report import Table, write_tables
from benchmarks.setting.timing import interleave
from cluster.errors import ConfigError
from cluster.plugins import load_plugin
from cluster.process import Process
from launch.commands.pretrain import parse_config

OBJECTIVES = {
    "full-softmax": (),
    "sampled-softmax": ("objective.num-negatives=1024", "objective.log-q", "objective.popularity-share=0.5"),
    "in-batch-softmax": (),
    **dict.fromkeys(("gbce", "bce", "bpr", "top1-max", "top1"), ("objective.normalised",)),
    # Its regularisation is made for small scores.
    "bpr-max": ("objective.normalised", "objective.regularisation=0.001"),
}
"""Options beside the defaults. All score by cosines over the recipe's temperature, which its learning rates are for."""

HEAD = ("objective", "targets/s", "steps", "epochs", "R@10 [95 %]", "N@10")
MEASURED_STEPS = 12


@dataclass(frozen=True, kw_only=True)
class Options:
    """Finished runs are not repeated."""

    data: str
    """Shards of `grail data build`."""
    recipe: str
    """Recipe whose objective is replaced."""
    seconds: float = 60.0
    """Training time of each run, without start-up, validation and checkpoints: processor time of each thread."""
    threads: int = 2
    """Of the one worker that trains."""
    seed: int = 0
    """Seed of all runs."""
    out: str = "runs/objectives"
    """Folder of the runs and of table.md."""
    names: tuple[str, ...] = tuple(OBJECTIVES)
    """Objectives to compare."""

    def __post_init__(self) -> None:
        require_known("--names", self.names, OBJECTIVES)

    def words(self, name: str) -> list[str]:
        """Options of `grail pretrain` with this objective."""
        words = ["--data.path", self.data, "--seed", str(self.seed)]
        words += ["--cluster.workers", "1", "--cluster.cpus-per-worker", str(self.threads)]
        words += ["--objective", name, "--objective.temperature", str(self._temperature())]
        return [*words, *option_words(OBJECTIVES[name])]

    def _temperature(self) -> float:
        """That of the recipe's own objective."""
        objective = load_plugin("launch.recipes", self.recipe).recipe().objective
        if objective is None:
            raise ConfigError(
                f"--recipe must have an objective to replace, and {self.recipe} has a loss of its own; take one of "
                "another model, such as sasrec"
            )
        return objective.temperature


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What a recipe does on this machine with one objective."""

    step_s: float
    targets_per_step: float
    steps_per_epoch: int

    def steps(self, seconds: float) -> int:
        """As many as take this time."""
        return max(round(seconds / self.step_s), 1)


def main(arguments: list[str]) -> None:
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.experiments.objectives")
    rows = []
    for name in options.names:
        pace = _pace(options, name)
        rows.append(_row(name, pace, options.seconds, _trained(options, name, pace)))
        write_tables(Path(options.out), Table(HEAD, rows))


def _row(name: str, pace: Pace, seconds: float, evaluation: dict) -> list[str]:
    steps, metrics = pace.steps(seconds), evaluation["metrics"]
    low, high = evaluation["intervals"]["recall@10"]
    return [
        name,
        f"{pace.targets_per_step / pace.step_s:,.0f}",
        f"{steps:,}",
        f"{steps / pace.steps_per_epoch:.1f}",
        f"{metrics['recall@10']:.4f} [{low:.4f}, {high:.4f}]",
        f"{metrics['ndcg@10']:.4f}",
    ]


def _pace(options: Options, name: str) -> Pace:
    """Measured in processes of their own, unless this run has been trained by an earlier measurement."""
    kept = Path(options.out) / name / "pace.json"
    words = [options.recipe, str(options.threads), *options.words(name)]
    keep_words(kept.with_name("command.json"), words, kept)
    if kept.exists():
        return Pace(**json.loads(kept.read_text()))
    measured = measure_on_ranks(_measure, 1, options.threads, options, name, timeout_s=300.0)
    kept.write_text(json.dumps(measured))
    return Pace(**measured)


def _measure(process: Process, options: Options, name: str) -> dict[str, float]:
    running: RunningRecipe = start(process, parse_config(options.recipe, options.words(name)))
    batches = first_batches(running.stream, MEASURED_STEPS)
    timing = interleave(process, {"ours": lambda: running.take_steps(batches)}, rounds=3)["ours"]
    return {
        "step_s": min(timing.cpu_s) / options.threads / len(batches),
        "targets_per_step": sum(batch.num_tokens for batch in batches) / len(batches),
        "steps_per_epoch": running.stream.steps_per_epoch(),
    }


def _trained(options: Options, name: str, pace: Pace) -> dict:
    """The content of evaluation.json."""
    steps = pace.steps(options.seconds)
    words = [*words_of_steps(steps), "--train.validate-every-steps", str(steps)]
    return evaluated(
        pretrain_once(Path(options.out) / name / "run", options.recipe, *options.words(name), *words)
    )


if __name__ == "__main__":
    sys.exit(run_experiment(main))
