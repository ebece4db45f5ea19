"""What alignment does to users whose true utility is known: `python -m benchmarks.experiments.alignment --help`.

For each world: shards, a retrieval model for item vectors, semantic IDs, a generator (SFT) and a reward model. Then for
each seed every objective from the same start with the same number of completions. True utility is 0 for a random list
and 1 for the best one; the reward is learnt and imperfect. With `--data`, `--ids` and `--policy-run` the same is done
from a policy that is there already, by the rewards for hits and ranks, which need no reward model.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
import tyro
from matplotlib.figure import Figure

from benchmarks.setting.commands import folder_name, grail, keep_words, require_known, run_experiment
from benchmarks.setting.paired import paired_change
from benchmarks.setting.report import Table
from cluster.errors import ConfigError
from data_streams.world import World, WorldConfig, world_fingerprint
from trainer.metric_log import read_metrics

WORLDS = {
    "middle": WorldConfig(num_users=6000, num_items=1500, num_clusters=40, mean_clicks=40.0, seed=0),
    "small": WorldConfig(num_users=3000, num_items=800, num_clusters=20, mean_clicks=30.0, seed=1, noise=1.4),
    "sparse": WorldConfig(
        num_users=8000, num_items=2500, num_clusters=80, mean_clicks=25.0, seed=2, noise=0.8
    ),
}
VARIANTS = {
    "GRPO": "--objective grpo",
    "GRPO without gate": "--objective grpo --rewards.hybrid.no-gate",
    "GRPO-SR": "--objective grpo-sr --objective.alpha 0.3",
    "GRPO-SR, catalogue": (
        "--objective grpo-sr --objective.alpha 0.3 --align.space catalogue --train.epochs 8 --train.max-steps 640"
    ),
    "ECPO": "--objective ecpo --objective.alpha 0.3",
    "GBPO": "--objective gbpo --objective.alpha 0.3 --advantage binary",
    "DPO": "--objective dpo --objective.alpha 0.3 --align.draws distinct",
}
"""On the worlds, by the hybrid reward; completions are drawn freely where the catalogue is not named."""
OWN_VARIANTS = {
    "GRPO-SR, hit + rank": "--objective grpo-sr --objective.alpha 0.3 --rewards hit,rank",
    "GRPO, hit + rank": "--objective grpo --rewards hit,rank",
}
"""On data of one's own."""
OTHER_REWARDS = ("GRPO without gate", "GRPO-SR, catalogue", "DPO")
"""Their rewards, or the completions rewarded, are not those of the other variants; their rows say where they began."""
POLICY = (
    "--cluster.workers 1 --model.width 48 --model.num-blocks 1 --model.num-depth-blocks 1 "
    "--model.feedforward-width 96 --model.dropout 0.1 --train.epochs 4 --data.tokens-per-step 1024 "
    "--train.learning-rate 3e-3 --train.precision fp32"
)
METRICS = ("recall@10", "recall@50", "ndcg@10", "utility@10", "utility@50", "hallucination_rate")
COMPARED = ("utility@10", "utility@50", "ndcg@10", "recall@50")
"""User by user with the start."""
DRAWN = ("utility@50", "ndcg@10")
"""The first there is."""
START, LAST, BEST = "SFT", "last", "best"
REWARD_STEPS = 20
"""Steps whose mean reward is that of a policy; of the start the first step alone."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Finished runs are not repeated."""

    out: str = "runs/alignment"
    """Folder of everything, of table.md and of picture.png."""
    worlds: tuple[str, ...] = tuple(WORLDS)
    """Worlds, of middle, small and sparse."""
    data: str = ""
    """Shards of one's own instead of the worlds; then --ids and --policy-run are needed too."""
    ids: str = ""
    """Semantic IDs of their items."""
    policy_run: str = ""
    """Run of the generator that alignment starts from."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the alignments; the start of a world is the same for all."""
    variants: tuple[str, ...] = ()
    """Objectives to compare; left out, all there are for worlds or for data of one's own."""
    code_size: int = 32
    """Codes of each of the three levels."""
    policy: str = POLICY
    """Options of the generator's pretraining, given as --policy="..." with an equals sign."""
    align: str = (
        "--train.epochs 4 --train.learning-rate 1e-4 --train.warmup-steps 60 --train.ema-decay 0.99 "
        "--align.users-per-step 32 --align.group-size 32 --train.validate-every-steps 200 --log.every-steps 1 "
        "--rollout.workers 0 --reward.workers 0"
    )
    """Options of all alignments, given as --align="--train.max-steps 100 ..." with an equals sign."""

    def __post_init__(self) -> None:
        if len({bool(name) for name in (self.data, self.ids, self.policy_run)}) > 1:
            raise ConfigError("--data, --ids and --policy-run are given together, or none of them")
        require_known("--variants", self.variants, self.known)
        require_known("--worlds", self.worlds, WORLDS)

    @property
    def known(self) -> dict[str, str]:
        """The variants there are, with their options."""
        return OWN_VARIANTS if self.data else VARIANTS

    def chosen(self) -> dict[str, str]:
        """Those to compare."""
        return {name: self.known[name] for name in self.variants or self.known}

    def places(self) -> tuple[str, ...]:
        """Names of the worlds, or that of the data."""
        return (Path(self.data).name,) if self.data else self.worlds


@dataclass(frozen=True, kw_only=True)
class Result:
    """A policy on the test clicks, user by user."""

    users: pl.DataFrame
    reward: float | None
    """Mean reward of its completions, or None where it was not seen to draw any."""
    step: int = 0
    first_reward: float | None = None
    """That of the start in the same run."""


Found = dict[str, dict[tuple[str, str], list[Result]]]
"""World -> (variant, which of its steps) -> one result per seed."""


def main(arguments: list[str]) -> None:
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.experiments.alignment")
    found: Found = {}
    for place in options.places():
        folder = Path(options.out).absolute() / place
        folder.mkdir(parents=True, exist_ok=True)
        if not options.data:
            _prepare(folder, place, options)
        policy = Path(options.policy_run).absolute() if options.data else folder / "policy"
        start = _evaluated(policy, BEST, folder / "start")
        results: dict[tuple[str, str], list[Result]] = {}
        for variant, given in options.chosen().items():
            for seed in options.seeds:
                run_dir = _aligned(folder, policy, variant, given, seed, options)
                for which in (LAST, BEST):
                    results.setdefault((variant, which), []).append(_result(run_dir, which, start))
            found[place] = {(START, BEST): [Result(users=start, reward=_of_start(results))], **results}
            _write(options, found)


def _of_start(results: dict[tuple[str, str], list[Result]]) -> float | None:
    """What the start's completions were rewarded with, by the reward that nearly all variants have."""
    firsts = [
        run.first_reward for (name, _), runs in results.items() if name not in OTHER_REWARDS for run in runs
    ]
    return float(np.mean(firsts)) if firsts else None


def _prepare(folder: Path, world: str, options: Options) -> None:
    """Data, vectors, semantic IDs, start and reward model of a world."""
    config = WORLDS[world]
    _require_same(folder, config)
    size = []
    for name, value in asdict(config).items():
        size += [f"--{name.replace('_', '-')}", str(value)]
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
        keep_words(folder / f"{name}.words.json", command, folder / name)
        if not done.exists():
            grail(*command)
            done.touch()


def _require_same(folder: Path, config: WorldConfig) -> None:
    """What is there already must be of this world. Raises: ConfigError."""
    manifest = folder / "clicks" / "manifest.json"
    if not manifest.exists():
        return
    made = World.from_source(json.loads(manifest.read_text())["source"]).config
    if made != config:
        raise ConfigError(f"{folder} must hold {config}, and holds {made}; give another --out, or remove it")


def _aligned(folder: Path, policy: Path, variant: str, given: str, seed: int, options: Options) -> Path:
    run_dir = folder / f"{folder_name(variant)}-{seed}"
    if options.data:
        setting = ["--data.path", str(Path(options.data).absolute())]
        setting += ["--data.semantic-ids", str(Path(options.ids).absolute())]
    else:
        setting = ["--rewards.hybrid.preference.run", f"{folder}/reward", "--data.pages", "recorded"]
        setting += ["--rewards.hybrid.relevance.vectors", f"{folder}/ids/run_embeddings.npy"]
    words = ["align", str(policy), "--run-dir", str(run_dir), *setting]
    words += [*options.align.split(), *given.split(), "--seed", str(seed)]
    aligned = run_dir / "alignment.json"
    keep_words(folder / f"{run_dir.name}.words.json", words, run_dir)
    if not aligned.exists():
        grail(*words)
    return run_dir


def _result(run_dir: Path, which: str, start: pl.DataFrame) -> Result:
    """The last or the best step on held-out items of a run; step 0 is the start itself."""
    ended = json.loads((run_dir / "alignment.json").read_text())
    step = ended["step" if which == LAST else "best_step"]
    lines = read_metrics(str(run_dir))
    rewards = [line["align/reward"] for line in lines if "align/reward" in line and line["step"] <= step]
    first = next(line["align/reward"] for line in lines if "align/reward" in line)
    users = _evaluated(run_dir, str(step), run_dir / "users") if step else start
    reward = float(np.mean(rewards[-REWARD_STEPS:])) if step else first
    return Result(users=users, reward=reward, step=step, first_reward=first)


def _evaluated(run_dir: Path, checkpoint: str, prefix: Path) -> pl.DataFrame:
    """Lists by constrained search; how many paths of a free search belong to no item, beside."""
    kept = Path(f"{prefix}-{checkpoint}.parquet")
    if not kept.exists():
        parts = []
        # The rate of the bare model: paths of seen items count as any others.
        for space, more in (("catalogue", ()), ("free", ("--evaluation.no-filter-seen",))):
            file = Path(f"{prefix}-{space}.parquet")
            given = ["--evaluation.cutoffs", "10", "50", "--search.space", space, "--search.width", "50"]
            grail(
                "evaluate", str(run_dir), "--checkpoint", checkpoint, *given, *more, "--per-user", str(file)
            )
            parts.append(pl.read_parquet(file).sort("user_row"))
        parts[0].with_columns(parts[1]["hallucination_rate"]).write_parquet(kept)
    return pl.read_parquet(kept)


def _write(options: Options, found: Found) -> None:
    """The table: means over seeds; changes with their intervals over users, paired with the start."""
    columns = next(iter(found.values()))[START, BEST][0].users.columns
    metrics = [metric for metric in METRICS if metric in columns]
    compared = [metric for metric in COMPARED if metric in columns]
    head = ["world", "policy", "step", "runs", "reward of the start", "reward", *metrics]
    head += [f"{metric} against SFT (95 %)" for metric in compared]
    rows = []
    for world, results in found.items():
        start = results[START, BEST][0].users
        for (name, which), runs in results.items():
            cells = _cells(runs, start, metrics, () if name == START else compared)
            cells += [""] * (len(head) - 3 - len(cells))
            rows.append([world, name, f"{which} ({_steps(runs)})", *cells])
    text = "\n".join([*_preface(options, found), str(Table(head, rows))]) + "\n"
    (Path(options.out) / "table.md").write_text(text)
    print(text, end="", flush=True)
    _draw(Path(options.out) / "picture.png", found)


def _preface(options: Options, found: Found) -> list[str]:
    lines = [
        f"Seeds {', '.join(map(str, options.seeds))} vary the alignment only (order of prompts, draws): the start, "
        "semantic IDs and reward model of a world are the same in all runs. Intervals are over users.",
        f"`{BEST}` is the step that was best on validation items; step 0 is the start. A reward is that of the "
        f"{REWARD_STEPS} steps up to that one, on training prompts; the start's is that of a run's first step.",
    ]
    if not options.data:
        prints = ", ".join(f"{world} {world_fingerprint(WORLDS[world])}" for world in found)
        lines.append(f"Fingerprints of the worlds: {prints}.")
    return [*lines, ""]


def _cells(
    runs: list[Result], start: pl.DataFrame, metrics: Sequence[str], compared: Sequence[str]
) -> list[str]:
    means = {metric: np.mean([run.users[metric].mean() for run in runs]) for metric in metrics}
    rewards = (
        [getattr(run, name) for run in runs if getattr(run, name) is not None]
        for name in ("first_reward", "reward")
    )
    cells = [str(len(runs)), *(f"{np.mean(values):.4f}" if values else "" for values in rewards)]
    cells += [f"{means[metric]:.4f}" for metric in metrics]
    users = [run.users for run in runs]
    return cells + [paired_change(users, [start], metric).as_share() for metric in compared]


def _steps(runs: list[Result]) -> str:
    steps = sorted({run.step for run in runs})
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def _draw(file: Path, found: Found) -> None:
    """The last steps; the best ones are hollow."""
    figure = Figure(figsize=(5 * len(found), 4), layout="constrained")
    for axes, (world, results) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        colours: dict[str, str] = {}
        columns = results[START, BEST][0].users.columns
        metric = next(metric for metric in DRAWN if metric in columns)
        for (name, which), runs in results.items():
            colour = colours.setdefault(name, f"C{len(colours)}")
            values = [run.users[metric].mean() for run in runs]
            rates = [run.users["hallucination_rate"].mean() for run in runs]
            fill = "none" if which == BEST and name != START else colour
            label = name if name == START or which == LAST else None
            axes.plot(rates, values, "o", color=colour, markerfacecolor=fill, label=label)
        axes.set(title=world, xlabel="illegal paths of a free search (HaR)", ylabel=metric)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(run_experiment(main))
