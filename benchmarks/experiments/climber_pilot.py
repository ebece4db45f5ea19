"""What Climber-Pilot's parts bring: `python -m benchmarks.experiments.climber_pilot --help`.

Pretraining: branches and hidden seconds, with recall drawn against them. Conditions: attention narrowed to matching
events against an embedding of the condition and against filtering the list behind the model, all from the same
pretrained run.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import polars as pl
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.setting.commands import evaluated_users, option_words, pretrain_once, run_experiment
from benchmarks.setting.paired import CHANGE_HEAD, change_cells, paired_change
from benchmarks.setting.report import Table, draw_points, mean_cells, write_tables

CUTOFFS = ("10", "20", "50")
METRICS = tuple(f"{metric}@{k}" for metric in ("recall", "condition") for k in CUTOFFS)
COMPARED = ("recall@10", "recall@50", "condition@10")
FILTERED = "post-filtering"
NOTHING_HIDDEN = "None"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train and evaluate once per variant and seed; finished runs are not repeated."""

    data: str
    """Shards of `grail data build`, with times."""
    out: str = "runs/climber-pilot"
    """Folder of the runs, of table.md and of picture.png."""
    branches: tuple[int, ...] = (1, 2)
    """Numbers of branches to compare."""
    windows_s: tuple[str, ...] = (NOTHING_HIDDEN, "900")
    """Hidden seconds to compare; None hides nothing. From three on, recall is drawn against them."""
    lags_s: tuple[float, ...] = (0.0, 900.0)
    """Seconds before the held-out event that evaluation hides, as where feedback comes in late."""
    conditions: bool = True
    """Compare ways to serve under a condition too, from the run with most branches and the last of the windows."""
    condition_column: str = "categories"
    """Item column of the conditions."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each variant."""
    extra: tuple[str, ...] = ()
    """Further options of all training runs as NAME=VALUE or NAME, such as train.epochs=4."""


@dataclass(frozen=True)
class Variant:
    branches: int
    window_s: str
    lag_s: float

    def __str__(self) -> str:
        return f"K = {self.branches}, window {self.window_s} s, feedback {self.lag_s:g} s late"


Found = dict[Variant | str, list[pl.DataFrame]]
"""Metrics by user, a frame for each seed, of variants of pretraining and of named ways to serve under a condition."""


def main(arguments: list[str]) -> None:
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.experiments.climber_pilot")
    found: Found = {}
    for seed in options.seeds:
        for branches, window in product(options.branches, options.windows_s):
            run_dir = _pretrained(options, branches, window, seed)
            for lag_s in options.lags_s:
                late = ("--data.feedback-lag-s", str(lag_s))
                users = _evaluated(run_dir, f"late-{lag_s:g}", *late)
                found.setdefault(Variant(branches, window, lag_s), []).append(users)
            _write(options, found)
        if options.conditions:
            for name, users in _under_conditions(options, run_dir, branches, window, seed).items():
                found.setdefault(name, []).append(users)
            _write(options, found)


def _pretrained(options: Options, branches: int, window: str, seed: int) -> Path:
    return _trained(
        options,
        "climber-pilot",
        f"k{branches}-{window}-{seed}",
        *("--seed", str(seed), "--model.num-branches", str(branches), "--model.time-window-s", window),
    )


def _trained(options: Options, recipe: str, name: str, *given: str) -> Path:
    further = option_words(options.extra)
    return pretrain_once(Path(options.out) / name, recipe, "--data.path", options.data, *given, *further)


def _under_conditions(
    options: Options, base: Path, branches: int, window: str, seed: int
) -> dict[str, pl.DataFrame]:
    column = ("--evaluation.condition-column", options.condition_column)
    results = {
        FILTERED: _evaluated(base, "filter", "--evaluation.condition", "filter", *column),
    }
    for way in ("attention", "embedding"):
        run_dir = _trained(
            options,
            "climber-pilot-cgsa",
            f"{base.name}-{way}",
            *("--seed", str(seed), "--init-from", str(base), "--model.condition-by", way),
            *("--model.condition-column", options.condition_column),
            *("--model.num-branches", str(branches), "--model.time-window-s", window),
        )
        results[f"condition {way}"] = _evaluated(run_dir, "asked")
    return results


def _evaluated(run_dir: Path, name: str, *options: str) -> pl.DataFrame:
    return evaluated_users(run_dir, name, "--evaluation.cutoffs", *CUTOFFS, *options)


def reference(variant: Variant | str, options: Options) -> Variant | str:
    """What a variant is compared with: fewest branches at the same window and delay, and filtering under conditions."""
    if isinstance(variant, str):
        return FILTERED
    return replace(variant, branches=min(options.branches))


def compared(found: Found, options: Options) -> tuple[Sequence[str], list[list[str]]]:
    """Head and rows of what changes user by user, over the seeds that both have."""
    rows = []
    for variant, runs in found.items():
        before = reference(variant, options)
        if before == variant or before not in found:
            continue
        seeds = min(len(runs), len(found[before]))
        measured = {*runs[0].columns} & {*found[before][0].columns}
        for metric in (name for name in COMPARED if name in measured):
            change = paired_change(runs[:seeds], found[before][:seeds], metric)
            rows.append(change_cells(before, variant, metric, seeds, change))
    return CHANGE_HEAD, rows


def curves(found: Found, metric: str) -> dict[tuple[int, float], list[tuple[float, list[float]]]]:
    """(branches, delay) -> hidden seconds in ascending order with the metric of each seed; 0 where nothing is hidden.

    A window of 0 s hides what happened at the very second of the target; it is drawn at half a second.
    """
    lines = {}
    for variant, runs in found.items():
        if isinstance(variant, Variant):
            hidden = 0.0 if variant.window_s == NOTHING_HIDDEN else max(float(variant.window_s), 0.5)
            values = [float(run[metric].mean()) for run in runs]
            lines.setdefault((variant.branches, variant.lag_s), []).append((hidden, values))
    return {name: sorted(points) for name, points in lines.items()}


def _write(options: Options, found: Found) -> None:
    """Means over seeds, changes user by user, and the picture."""
    rows = [[str(name), str(len(runs)), *mean_cells(runs, METRICS)] for name, runs in found.items()]
    folder = Path(options.out)
    write_tables(folder, Table(["variant", "seeds", *METRICS], rows), Table(*compared(found, options)))
    is_curve = len(options.windows_s) > 2
    figure = Figure(figsize=(15 if is_curve else 9, max(1 + 0.45 * len(found), 4)), layout="constrained")
    points, *further = figure.subplots(1, 1 + is_curve, squeeze=False)[0]
    draw_points(points, {str(name): runs for name, runs in found.items()}, "recall@10")
    for axes in further:
        _draw_curves(axes, found)
    figure.savefig(folder / "picture.png", dpi=120)


def _draw_curves(axes: Axes, found: Found) -> None:
    for (branches, lag_s), line in curves(found, "recall@10").items():
        hidden = [window for window, _ in line]
        means = [sum(values) / len(values) for _, values in line]
        (drawn,) = axes.plot(hidden, means, "-", label=f"K = {branches}, feedback {lag_s:g} s late")
        for window, values in line:
            axes.plot([window] * len(values), values, "o", color=drawn.get_color(), markersize=3)
    axes.set_xscale("symlog", linthresh=100)
    axes.set(xlabel="hidden seconds before a target (0: nothing hidden)", ylabel="recall@10")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


if __name__ == "__main__":
    sys.exit(run_experiment(main))
