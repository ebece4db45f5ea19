"""What Climber-Pilot's parts bring: `python -m benchmarks.experiments.climber_pilot --help`.

Pretraining: branches and hidden seconds. Conditions: attention narrowed to matching events against an embedding of the
condition and against filtering the list behind the model, all from the same pretrained run.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from benchmarks.setting.commands import evaluated, grail

CUTOFFS = ("10", "20", "50")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train and evaluate once per variant and seed; finished runs are not repeated."""

    data: str
    """Shards of `grail data build`, with times."""
    out: str = "runs/climber-pilot"
    """Folder of the runs, of table.md and of picture.png."""
    branches: tuple[int, ...] = (1, 2)
    """Numbers of branches to compare."""
    windows_s: tuple[str, ...] = ("None", "900")
    """Hidden seconds to compare; None hides nothing."""
    lags_s: tuple[float, ...] = (0.0, 900.0)
    """Seconds before the held-out event that evaluation hides, as where feedback comes in late."""
    conditions: bool = True
    """Compare ways to serve under a condition too, from the run with most branches and the last of the windows."""
    condition_column: str = "categories"
    """Item column of the conditions."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each variant."""
    extra: tuple[str, ...] = ()
    """Further options of all training runs as NAME=VALUE, such as train.epochs=4."""


def main(arguments: list[str]) -> None:
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.experiments.climber_pilot")
    found: dict[str, list[dict]] = {}
    for seed in options.seeds:
        for branches in options.branches:
            for window in options.windows_s:
                run_dir = _pretrained(options, branches, window, seed)
                for lag_s in options.lags_s:
                    name = f"K = {branches}, window {window} s, feedback {lag_s:g} s late"
                    late = ("--data.feedback-lag-s", str(lag_s))
                    found.setdefault(name, []).append(_evaluated(run_dir, f"late-{lag_s:g}", *late))
        if options.conditions:
            for name, result in _under_conditions(options, run_dir, branches, window, seed).items():
                found.setdefault(name, []).append(result)
        _write(options, found)


def _pretrained(options: Options, branches: int, window: str, seed: int) -> Path:
    return _trained(
        options,
        "climber-pilot",
        f"k{branches}-{window}-{seed}",
        *("--seed", str(seed), "--model.num-branches", str(branches), "--model.time-window-s", window),
    )


def _trained(options: Options, recipe: str, name: str, *given: str) -> Path:
    run_dir = Path(options.out) / name
    extra = [
        word for pair in options.extra for word in (f"--{pair.partition('=')[0]}", pair.partition("=")[2])
    ]
    grail("pretrain", recipe, "--data.path", options.data, "--run-dir", str(run_dir), *given, *extra)
    return run_dir


def _under_conditions(options: Options, base: Path, branches: int, window: str, seed: int) -> dict[str, dict]:
    column = ("--evaluation.condition-column", options.condition_column)
    results = {
        "post-filtering": _evaluated(base, "filter", "--evaluation.condition", "filter", *column),
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


def _evaluated(run_dir: Path, name: str, *options: str) -> dict:
    """Evaluated once; the result is kept beside the run's own."""
    kept = run_dir / f"evaluation-{name}.json"
    if not kept.exists():
        kept.write_text(json.dumps(evaluated(run_dir, "--evaluation.cutoffs", *CUTOFFS, *options)))
    return json.loads(kept.read_text())


def _write(options: Options, found: dict[str, list[dict]]) -> None:
    """The table, means over seeds, and the picture."""
    names = [f"{metric}@{k}" for metric in ("recall", "condition") for k in CUTOFFS]
    lines = [f"| variant | seeds | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for variant, results in found.items():
        cells = [_mean(results, name) for name in names]
        shown = " | ".join("" if cell is None else f"{cell:.4f}" for cell in cells)
        lines.append(f"| {variant} | {len(results)} | {shown} |")
    folder = Path(options.out)
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    figure = Figure(figsize=(9, 1 + 0.45 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, results in enumerate(found.values()):
        for result in results:
            low, high = result["intervals"]["recall@10"]
            axes.plot([low, high], [place, place], color="tab:blue", alpha=0.4, linewidth=4)
            axes.plot(result["metrics"]["recall@10"], place, "o", color="tab:blue")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel("recall@10, a point and a 95 % interval over users for each seed")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(folder / "picture.png", dpi=120)


def _mean(results: list[dict], name: str) -> float | None:
    values = [result["metrics"][name] for result in results if name in result["metrics"]]
    return sum(values) / len(values) if values else None


if __name__ == "__main__":
    main(sys.argv[1:])
