"""Tokenizers and their inputs on the same decoder: `python -m benchmarks.experiments.tokenizers --help`.

One table of semantic IDs for each tokenizer and input, with its collisions and how well prefixes agree with categories,
and beside it the quality of a decoder that is trained and evaluated on it.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from benchmarks.setting.commands import (
    evaluated,
    grail,
    keep_words,
    option_words,
    pretrain_once,
    require_known,
    run_experiment,
)
from benchmarks.setting.report import Table, draw_intervals, write_tables

METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
DRAWN = "recall@10"
TOKENIZERS: dict[str, tuple[str, ...]] = {
    "residual-kmeans": ("residual-kmeans",),
    "residual-kmeans, reassigned": ("residual-kmeans", "--collisions", "reassign"),
    "balanced-kmeans": ("balanced-kmeans",),
    "rq-vae": ("rq-vae",),
    "finite-scalar": ("finite-scalar",),
    "random-codes": ("random-codes",),
}
INPUTS = ("text", "run", "both")
BLIND = ("random-codes",)
"""Do not look at their input, so that one of them is enough."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Tokenize, train and evaluate once per tokenizer, input and seed; finished parts are not repeated."""

    data: str
    """Shards of `grail data build`."""
    text: str
    """Matrix (.npy) of the items' text vectors."""
    run: str
    """Trained run whose item vectors are the collaborative input."""
    out: str = "runs/tokenizers"
    """Folder of tables and runs, of table.md and of picture.png."""
    tokenizers: tuple[str, ...] = tuple(TOKENIZERS)
    """Which to compare."""
    inputs: tuple[str, ...] = INPUTS
    """What is tokenized: text vectors, vectors of the run, or both fused."""
    recipe: str = "decoder-amazon"
    """Recipe of the decoder."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the decoder; tables have one seed."""
    extra: tuple[str, ...] = ()
    """Further options of all training runs as NAME=VALUE, such as train.epochs=4."""

    def __post_init__(self) -> None:
        require_known("--tokenizers", self.tokenizers, TOKENIZERS)
        require_known("--inputs", self.inputs, INPUTS)

    def input_words(self, name: str) -> tuple[str, ...]:
        text, run = ("--embeddings.file", self.text), ("--embeddings.from-run", self.run)
        return {"text": text, "run": run, "both": (*text, *run)}[name]


def main(arguments: list[str]) -> None:
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.experiments.tokenizers")
    found: dict[tuple[str, str], tuple[dict, list[dict]]] = {}
    for seed in options.seeds:
        for tokenizer in options.tokenizers:
            for given in options.inputs[:1] if tokenizer in BLIND else options.inputs:
                table, report = _tokenized(options, tokenizer, given)
                _, results = found.setdefault((tokenizer, given), (report, []))
                results.append(_trained(options, table, seed))
                _write(Path(options.out), found)


def _tokenized(options: Options, tokenizer: str, given: str) -> tuple[Path, dict]:
    """The folder of a table and its report."""
    folder = Path(options.out) / "ids" / f"{tokenizer.replace(', ', '-')}-{given}"
    place = ("--data", options.data, "--out", str(folder), "--overwrite")
    words = ("tokenize", *TOKENIZERS[tokenizer], *place, *options.input_words(given))
    keep_words(folder / "command.json", words, folder / "report.json")
    if not (folder / "report.json").exists():
        grail(*words)
    return folder, json.loads((folder / "report.json").read_text())


def _trained(options: Options, table: Path, seed: int) -> dict:
    run_dir = Path(options.out) / "runs" / f"{table.name}-{seed}"
    place = ("--data.path", options.data, "--data.semantic-ids", str(table))
    pretrain_once(run_dir, options.recipe, *place, "--seed", str(seed), *option_words(options.extra))
    kept = run_dir / "evaluation.json"
    return json.loads(kept.read_text()) if kept.exists() else evaluated(run_dir)


def _write(folder: Path, found: dict[tuple[str, str], tuple[dict, list[dict]]]) -> None:
    """The table, means over seeds, and the picture."""
    names = ["tokenizer", "input", "share a path", "purity of the first code", "seeds", *METRICS]
    rows = []
    for (tokenizer, given), (report, results) in found.items():
        means = [sum(result["metrics"][name] for result in results) / len(results) for name in METRICS]
        purity = f"{report['purity'][0]:.3f}" if report.get("purity") else ""
        cells = [tokenizer, given, f"{report['collision_rate']:.2%}", purity, str(len(results))]
        rows.append([*cells, *(f"{mean:.4f}" for mean in means)])
    write_tables(folder, Table(names, rows))
    figure = Figure(figsize=(8, 1 + 0.35 * len(found)), layout="constrained")
    drawn = {
        ", ".join(name): [(one["metrics"][DRAWN], *one["intervals"][DRAWN]) for one in results]
        for name, (_, results) in found.items()
    }
    draw_intervals(figure.subplots(), drawn, DRAWN)
    figure.savefig(folder / "picture.png", dpi=120)


if __name__ == "__main__":
    sys.exit(run_experiment(main))
