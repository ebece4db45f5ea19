"""What alignment does to users whose true utility is known: `python -m benchmarks.experiments.alignment --help`.

For each world: shards, a retrieval model for item vectors, semantic IDs, a generator (SFT) and a reward model. Then for
each seed every objective from the same start with the same number of completions. True utility is 0 for a random list
and 1 for the best one; the reward is learnt and imperfect.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import tyro
from matplotlib.figure import Figure

from benchmarks.setting.commands import evaluated_users, grail
from benchmarks.setting.paired import paired_change

WORLDS = {
    "middle": "--num-users 6000 --num-items 1500 --num-clusters 40 --mean-clicks 40 --seed 0",
    "small": "--num-users 3000 --num-items 800 --num-clusters 20 --mean-clicks 30 --seed 1",
    "sparse": "--num-users 8000 --num-items 2500 --num-clusters 80 --mean-clicks 25 --seed 2",
}
VARIANTS = {
    "GRPO": "--objective grpo",
    "GRPO without gate": "--objective grpo --rewards.hybrid.no-gate",
    "GRPO-SR": "--objective grpo-sr --objective.alpha 0.3",
    "ECPO": "--objective ecpo --objective.alpha 0.3",
    "GBPO": "--objective gbpo --objective.alpha 0.3 --advantage binary",
}
POLICY = (
    "--cluster.workers 1 --model.width 48 --model.num-blocks 1 --model.num-depth-blocks 1 "
    "--model.feedforward-width 96 --model.dropout 0.1 --train.epochs 4 --data.tokens-per-step 1024 "
    "--train.learning-rate 3e-3 --train.precision fp32"
)
METRICS = ("recall@10", "recall@50", "utility@10", "utility@50", "hallucination_rate")
START = "SFT"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Finished runs are not repeated."""

    out: str = "runs/alignment"
    """Folder of everything, of table.md and of picture.png."""
    worlds: tuple[str, ...] = tuple(WORLDS)
    """Worlds, of middle, small and sparse."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the alignments; the start of a world is the same for all."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Objectives to compare."""
    code_size: int = 32
    """Codes of each of the three levels."""
    checkpoint: str = "latest"
    """Which step is shown: latest, or best on held-out items."""
    policy: str = POLICY
    """Options of the generator's pretraining."""
    align: str = (
        "--train.learning-rate 3e-4 --train.ema-decay 0.99 --align.users-per-step 32 --align.group-size 32 "
        "--data.pages recorded --train.validate-every-steps 100 --rollout.workers 0 --reward.workers 0"
    )
    """Options of all alignments."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A policy on the test clicks, user by user."""

    users: pl.DataFrame
    reward: float | None
    """Mean reward of the completions of its last steps."""


def main(arguments: list[str]) -> None:
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.experiments.alignment")
    found: dict[str, dict[str, list[Result]]] = {}
    for world in options.worlds:
        folder = Path(options.out).absolute() / world
        _prepare(folder, world, options)
        results = found.setdefault(world, {START: [_evaluated(folder / "policy", "best")]})
        for variant in options.variants:
            for seed in options.seeds:
                run_dir = _aligned(folder, variant, seed, options)
                results.setdefault(variant, []).append(_evaluated(run_dir, options.checkpoint))
            _write(Path(options.out), found)


def _prepare(folder: Path, world: str, options: Options) -> None:
    """Data, vectors, semantic IDs, start and reward model of a world."""
    size = WORLDS[world].split()
    pages = "--keep-exposures --sequence-actions click cart purchase --split-actions click".split()
    sizes = [str(options.code_size)] * 3
    tokenize = ["--data", f"{folder}/clicks", "--embeddings.from-run", f"{folder}/items"]
    tokenize += ["--collisions", "reassign", "--code-sizes", *sizes]
    policy = ["--data.path", f"{folder}/clicks", "--data.semantic-ids", f"{folder}/ids"]
    items = ["--data.path", f"{folder}/clicks", "--run-dir", f"{folder}/items", "--train.epochs", "2"]
    reward = ["--data.path", f"{folder}/pages", "--run-dir", f"{folder}/reward"]
    policy += ["--run-dir", f"{folder}/policy", *options.policy.split()]
    steps = {
        "clicks": ["data", "build", "world", *size, "--out", f"{folder}/clicks"],
        "pages": ["data", "build", "world", *size, *pages, "--out", f"{folder}/pages"],
        "items": ["pretrain", "sasrec", *items],
        "ids": ["tokenize", "residual-kmeans", *tokenize, "--out", f"{folder}/ids"],
        "policy": ["pretrain", "decoder-amazon", *policy],
        "reward": ["pretrain", "reward-sim", *reward],
        "calibration": ["evaluate", f"{folder}/reward"],
    }
    for name, command in steps.items():
        done = folder / f"{name}.done"
        if not done.exists():
            grail(*command)
            done.touch()


def _aligned(folder: Path, variant: str, seed: int, options: Options) -> Path:
    run_dir = folder / f"{variant.lower().replace(' ', '-')}-{seed}"
    if not (run_dir / "alignment.json").exists():
        rewards = ["--rewards.hybrid.preference.run", f"{folder}/reward"]
        rewards += ["--rewards.hybrid.relevance.vectors", f"{folder}/ids/run_embeddings.npy"]
        given = [*VARIANTS[variant].split(), *rewards, *options.align.split(), "--seed", str(seed)]
        grail("align", f"{folder}/policy", "--run-dir", str(run_dir), *given)
    return run_dir


def _evaluated(run_dir: Path, checkpoint: str) -> Result:
    """Lists by constrained search; how many paths of a free search belong to no item, beside."""
    kept = run_dir / f"users-{checkpoint}.parquet"
    if not kept.exists():
        parts = []
        for space in ("catalogue", "free"):
            given = ["--evaluation.cutoffs", "10", "50", "--search.space", space, "--search.width", "50"]
            name = f"{checkpoint}-{space}"
            parts.append(evaluated_users(run_dir, name, "--checkpoint", checkpoint, *given))
        parts[0].with_columns(parts[1]["hallucination_rate"]).write_parquet(kept)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["align/reward"] for line in lines if "align/reward" in line]
    return Result(users=pl.read_parquet(kept), reward=rewards[-1] if rewards else None)


def _write(folder: Path, found: dict[str, dict[str, list[Result]]]) -> None:
    """The table: means over seeds; the change of HR@50 with its interval over users, paired with the start."""
    head = ["world", "policy", "seeds", "reward", *METRICS, "utility@10 against SFT", "HR@50 - SFT (95 %)"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for world, results in found.items():
        start = results[START][0].users
        for name, runs in results.items():
            means = {metric: np.mean([run.users[metric].mean() for run in runs]) for metric in METRICS}
            rewards = [run.reward for run in runs if run.reward is not None]
            gain = means["utility@10"] / start["utility@10"].mean() - 1
            change = paired_change([run.users for run in runs], [start], "recall@50")
            cells = [world, name, str(len(runs)), f"{np.mean(rewards):.4f}" if rewards else ""]
            cells += [f"{means[metric]:.4f}" for metric in METRICS]
            cells += [f"{gain:+.1%}", str(change)]
            lines.append(f"| {' | '.join(cells)} |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    _draw(folder / "picture.png", found)


def _draw(file: Path, found: dict[str, dict[str, list[Result]]]) -> None:
    figure = Figure(figsize=(5 * len(found), 4), layout="constrained")
    for axes, (world, results) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        for name, runs in results.items():
            utility = [run.users["utility@10"].mean() for run in runs]
            rates = [run.users["hallucination_rate"].mean() for run in runs]
            axes.plot(rates, utility, "o", label=name)
        axes.set(
            title=f"world {world}", xlabel="illegal paths of a free search (HaR)", ylabel="true utility@10"
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
