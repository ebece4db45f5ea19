"""What PROMISE's process reward model brings in the search: `python -m benchmarks.experiments.promise --help`.

Each trained run is searched by a plain beam, with its PRM, with the PRM at single depths, and by a plain beam as much
wider as costs the FLOPs of the PRM; then with more and more candidates.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.setting.commands import (
    evaluated_users,
    grail,
    keep_words,
    option_words,
    pretrain_once,
    run_experiment,
)
from benchmarks.setting.paired import CHANGE_HEAD, change_cells, paired_change
from benchmarks.setting.report import Table, draw_points, mean_cells, write_tables
from cluster.errors import ConfigError
from data_streams.semantic_ids import SemanticIdTable

PLAIN, GUIDED, WIDER = "plain beam", "PRM", "plain beam of equal FLOPs"
LARGER = "larger model, plain beam"
CUTOFFS = ("5", "10", "50")
METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "recall@50")
COMPARED = ("recall@10", "ndcg@10", "recall@50")
DEPTH = 3
"""Of HRecall."""

Lines = list[dict]
"""Searches of search_scaling.json, or one of each of several such files."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train once per seed and evaluate once per search; finished runs are not repeated."""

    data: str
    """Shards of `grail data build`."""
    ids: str
    """Semantic IDs of its items."""
    recipe: str = "promise"
    """promise, or promise-amazon for the Amazon sets."""
    out: str = "runs/promise-parts"
    """Folder of the runs, of table.md and of picture.png."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    width: int = 50
    """Prefixes the beam keeps."""
    candidates: tuple[int, ...] = (50, 100, 200, 400)
    """Numbers of candidates (K+) to draw HRecall against, at least two, the first of them the width."""
    guided: int = 200
    """Candidates where the PRM is compared by depth and with the wider beam; one of those above."""
    larger: tuple[str, ...] = ()
    """Trained generators of the same semantic IDs whose plain beams stand beside, such as seeds of a larger model; they
    are measured with the first seed."""
    user_share: float = 1.0
    """Share of the test users that are searched for; always the same ones."""
    extra: tuple[str, ...] = ()
    """Further options of all training runs as NAME=VALUE or NAME, such as train.epochs=4."""

    def __post_init__(self) -> None:
        if self.width < int(CUTOFFS[-1]):
            raise ConfigError(
                f"--width must be at least {CUTOFFS[-1]}, the longest list that is measured, got {self.width}"
            )
        if len(self.candidates) < 2 or self.candidates[0] != self.width or self.guided not in self.candidates:
            raise ConfigError(
                f"candidates must be two numbers or more, begin with the width {self.width} and hold --guided "
                f"{self.guided}; got {self.candidates}"
            )


def main(arguments: list[str]) -> None:
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.experiments.promise")
    found: dict[str, list[pl.DataFrame]] = {}
    scaling: dict[str, list[Lines]] = {}
    for seed in options.seeds:
        given = ("--data.path", options.data, "--data.semantic-ids", options.ids, "--seed", str(seed))
        run_dir = Path(options.out) / f"seed-{seed}"
        pretrain_once(run_dir, options.recipe, *given, *option_words(options.extra))
        lines, beside = _scaling(options, run_dir, options.larger if seed == options.seeds[0] else ())
        scaling.setdefault("own", []).append(lines)
        scaling.setdefault(LARGER, []).extend(beside)
        for name, users in _searched(options, run_dir, lines).items():
            found.setdefault(name, []).append(users)
        _write(options, found, scaling)


def _searched(options: Options, run_dir: Path, lines: Lines) -> dict[str, pl.DataFrame]:
    """Users' metrics for each way to search, all of lists as long."""
    prm = ("--search.prm", "--search.candidates", str(options.guided))
    depths = range(1, len(SemanticIdTable.load(options.ids).code_sizes) + 1)
    of_prm = f"prm-{options.width}-{options.guided}"
    searches = {PLAIN: (f"plain-{options.width}", "--search.no-prm"), GUIDED: (of_prm, *prm)}
    for depth in depths:
        given = ("--search.prm-depths", str(depth))
        searches[f"PRM at depth {depth} alone"] = (f"{of_prm}-depth-{depth}", *prm, *given)
    width = equal_width(lines, options.guided)
    if width is not None:
        searches[WIDER] = (f"plain-{width}", "--search.no-prm", "--search.width", str(width))
    common = _common_words(options)
    return {
        name: evaluated_users(run_dir, file, *common, *given) for name, (file, *given) in searches.items()
    }


def _common_words(options: Options) -> list[str]:
    """Of all searches."""
    words = ["--evaluation.cutoffs", *CUTOFFS, "--evaluation.user-share", str(options.user_share)]
    return [*words, "--search.width", str(options.width)]


def _scaling(options: Options, run_dir: Path, larger: Sequence[str]) -> tuple[Lines, list[Lines]]:
    """Searches of a run with more and more candidates, and the plain beams of larger ones; measured once."""
    name = "beside" if larger else "own"
    kept = run_dir / f"search-scaling-{name}-{'-'.join(map(str, options.candidates))}.json"
    numbers = ("--search.candidates", *map(str, options.candidates))
    words = (*_common_words(options), "--search.prm", *numbers, *(("--beside", *larger) if larger else ()))
    keep_words(kept.with_suffix(".words.json"), words, kept)
    if not kept.exists():
        grail("evaluate", str(run_dir), *words)
        shutil.copy(run_dir / "search_scaling.json", kept)
    lines = json.loads(kept.read_text())["searches"]
    beside = of_kind(lines, "beside")
    runs = dict.fromkeys(line["run"] for line in beside)
    own = [line for line in lines if line["kind"] != "beside"]
    return own, [[line for line in beside if line["run"] == run] for run in runs]


def of_kind(lines: Lines, kind: str) -> Lines:
    """In the order of what they cost."""
    return sorted((line for line in lines if line["kind"] == kind), key=lambda line: line["gflop_per_user"])


def plain_at(lines: Lines, gflop: float, metric: str) -> float | None:
    """What a plain beam of this cost has, on the line between those next to it; None beyond those measured."""
    plain = of_kind(lines, "plain")
    costs = [line["gflop_per_user"] for line in plain]
    if not costs[0] <= gflop <= costs[-1]:
        return None
    return float(np.interp(gflop, costs, [line[metric] for line in plain]))


def equal_width(lines: Lines, candidates: int) -> int | None:
    """Width of the plain beam that costs what a PRM with so many candidates does."""
    (guided,) = (line for line in lines if line["kind"] == "prm" and line["number"] == candidates)
    width = plain_at(lines, guided["gflop_per_user"], "number")
    return None if width is None else round(width)


def mean_lines(files: Sequence[Lines]) -> Lines:
    """The same searches of several runs, each number averaged."""
    return [
        {
            name: value if isinstance(value, str) else sum(line[name] for line in same) / len(same)
            for name, value in same[0].items()
        }
        for same in zip(*files, strict=True)
    ]


def scaling_rows(lines: Lines, names: Sequence[str]) -> list[list[str]]:
    """A row for each search; beside a PRM what a plain beam of equal FLOPs has."""
    rows = []
    for line in lines:
        cells = [
            line["kind"],
            f"{line['number']:.0f}",
            f"{line['gflop_per_user']:.3g}",
            f"{line['ms_per_user']:.1f}",
        ]
        for name in names:
            equal = plain_at(lines, line["gflop_per_user"], name) if line["kind"] == "prm" else None
            cells.append(f"{line[name]:.4f}" + ("" if equal is None else f" ({equal:.4f})"))
        rows.append(cells)
    return rows


def compared(found: dict[str, list[pl.DataFrame]]) -> list[list[str]]:
    """The PRM against both plain beams, and each single depth against the plain one, user by user."""
    pairs = [(PLAIN, name) for name in found if name != PLAIN] + [(WIDER, GUIDED)]
    rows = []
    for before, after in pairs:
        # A seed whose PRM costs more than every plain beam measured has none of equal FLOPs.
        if len(found.get(before, ())) != len(found[after]):
            continue
        for metric in COMPARED:
            change = paired_change(found[after], found[before], metric)
            rows.append(change_cells(before, after, metric, len(found[after]), change))
    return rows


def _write(options: Options, found: dict[str, list[pl.DataFrame]], scaling: dict[str, list[Lines]]) -> None:
    """Means over seeds; what the PRM changes, user by user; what searches cost; and the picture."""
    hrecall = _prefix_recall(scaling["own"][0], options.width)
    measured = (*METRICS, *hrecall)
    rows = [[name, str(len(runs)), *mean_cells(runs, measured)] for name, runs in found.items()]
    names = ("recall@10", "recall@50", hrecall[-1])
    own = mean_lines(scaling["own"])
    cost_rows = scaling_rows(own, names)
    larger = mean_lines(scaling[LARGER])
    cost_rows += [[LARGER, *row[1:]] for row in scaling_rows(larger, names)]
    cost_head = ["search", "K+ or width", "GFLOP per user", "ms per user"]
    cost_head += [f"{name} (plain beam of equal FLOPs)" for name in names]
    folder = Path(options.out)
    write_tables(
        folder,
        Table(["search", "seeds", *measured], rows),
        Table(CHANGE_HEAD, compared(found)),
        Table(cost_head, cost_rows),
    )
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    points, by_number, by_cost = figure.subplots(1, 3)
    draw_points(points, found, "recall@10")
    _draw_scaling(by_number, by_cost, own, larger, hrecall[-1])
    figure.savefig(folder / "picture.png", dpi=120)


def _prefix_recall(lines: Lines, width: int) -> list[str]:
    """Names of HRecall at the first depths."""
    names = [f"hrecall{depth}@{width}" for depth in range(1, DEPTH + 1)]
    return [name for name in names if name in lines[0]]


def _draw_scaling(by_number: Axes, by_cost: Axes, own: Lines, larger: Lines, metric: str) -> None:
    series = {GUIDED: of_kind(own, "prm"), PLAIN: of_kind(own, "plain"), LARGER: larger}
    for name, lines in series.items():
        if not lines:
            continue
        values = [line[metric] for line in lines]
        by_number.plot([line["number"] for line in lines], values, "-o", label=name)
        by_cost.plot([line["gflop_per_user"] for line in lines], values, "-o", label=name)
    by_number.set(xlabel="candidates of the PRM (K+), or width of a plain beam", xscale="log", ylabel=metric)
    numbers = sorted({round(line["number"]) for lines in series.values() for line in lines})
    by_number.set_xticks(numbers, map(str, numbers))
    by_number.minorticks_off()
    by_cost.set(xlabel="GFLOP per user")
    for axes in (by_number, by_cost):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)


if __name__ == "__main__":
    sys.exit(run_experiment(main))
