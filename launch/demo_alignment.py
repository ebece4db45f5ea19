"""The second half of the demo: items get semantic IDs, a generator learns to write them, and is aligned by rewards."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from cluster.storage import Storage
from launch.run_directory import load_config


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is small and quick, or large enough to be worth looking at."""

    code_size: str
    width: str
    epochs: str
    reward_epochs: str
    prm_epochs: str
    align_steps: str
    group_size: str
    validate_every: str


SIZES = {
    "small": Sizes(
        code_size="16",
        width="32",
        epochs="4",
        reward_epochs="1",
        prm_epochs="4",
        align_steps="24",
        group_size="16",
        validate_every="12",
    ),
    "full": Sizes(
        code_size="32",
        width="48",
        epochs="5",
        reward_epochs="2",
        prm_epochs="1",
        align_steps="180",
        group_size="32",
        validate_every="60",
    ),
}


@dataclass(frozen=True, kw_only=True)
class AlignmentDemo:
    """Folders of the demo, and how large everything is."""

    out: str
    seed: int
    scale: str

    @property
    def clicks(self) -> str:
        return f"{self.out}/shards"

    @property
    def pages(self) -> str:
        return f"{self.out}/pages"

    def build_pages(self, world: Any, workers: int) -> None:
        """The same world with what was shown and not chosen; the same clicks are held out."""
        from cluster.configuration import ClusterConfig
        from data_streams.build import BuildConfig, build
        from data_streams.manifest import MANIFEST_NAME

        if not Storage(self.pages).exists(MANIFEST_NAME):
            build(
                world,
                BuildConfig(
                    out=self.pages,
                    keep_exposures=True,
                    sequence_actions=("click", "cart", "purchase"),
                    split_actions=("click",),
                    cluster=ClusterConfig(workers=workers),
                ),
            )

    def tokenize(self) -> None:
        """Semantic IDs from the vectors that the retrieval model of the first half has learnt."""
        from data_streams.semantic_ids import HEADER_NAME
        from launch.commands import tokenize

        if not Storage(f"{self.out}/ids").exists(HEADER_NAME):
            sizes = [SIZES[self.scale].code_size] * 3
            run = f"{self.out}/run"
            options = ["--data", self.clicks, "--out", f"{self.out}/ids", "--embeddings.from-run", run]
            options += ["--collisions", "reassign", "--code-sizes", *sizes]
            tokenize.run(["residual-kmeans", *options])

    def pretrain(self) -> int:
        """The generator; what rewards it: a model of answers, calibrated by its evaluation, and a PRM."""
        from launch.commands import evaluate, pretrain

        sizes, seed = SIZES[self.scale], ["--seed", str(self.seed), "--cluster.workers", "1"]
        clicks = ["--data.path", self.clicks, "--data.semantic-ids", f"{self.out}/ids"]
        # The PRM's encoder begins as the generator's, so both have the same sizes.
        clicks += ["--model.width", sizes.width, "--model.num-blocks", "1", "--model.feedforward-width", "96"]
        clicks += ["--model.dropout", "0.1", "--train.learning-rate", "3e-3"]
        policy = [*clicks, "--run-dir", f"{self.out}/policy", "--train.epochs", sizes.epochs]
        policy += ["--model.num-depth-blocks", "1"]
        prm = [*clicks, "--run-dir", f"{self.out}/prm", "--train.epochs", sizes.prm_epochs]
        prm += ["--init-from", f"{self.out}/policy", "--model.prm.positions", "8"]
        # Without a likeness, whose scores are of another size than the weight below is for.
        prm += ["--model.prm.num-negatives", "128", "--model.prm.likeness-negatives", "None"]
        reward = ["--data.path", self.pages, "--run-dir", f"{self.out}/reward"]
        reward += ["--train.epochs", sizes.reward_epochs]
        for recipe, options in (("decoder-amazon", policy), ("reward-sim", reward), ("promise-prm", prm)):
            if code := pretrain.train(pretrain.parse_config(recipe, [*options, *seed])):
                return code
        evaluate.evaluate(load_config(f"{self.out}/reward"))
        return 0

    def align(self) -> int:
        """One learner, a worker that draws and one that rewards."""
        from launch.commands import align

        sizes = SIZES[self.scale]
        options = ["--run-dir", f"{self.out}/aligned", "--seed", str(self.seed)]
        # A PRM that has seen little counts for little, beside advantages of about 1.
        options += ["--rewards", "hybrid,process", "--rewards.process.run", f"{self.out}/prm"]
        options += ["--rewards.process.direct", "--rewards.process.weight", "0.15"]
        options += ["--rewards.hybrid.preference.run", f"{self.out}/reward"]
        options += ["--rewards.hybrid.relevance.vectors", f"{self.out}/ids/run_embeddings.npy"]
        options += ["--align.group-size", sizes.group_size, "--train.max-steps", sizes.align_steps]
        options += ["--train.epochs", "100", "--train.validate-every-steps", sizes.validate_every]
        options += ["--train.learning-rate", "3e-4", "--train.ema-decay", "0.99", "--log.every-steps", "4"]
        options += ["--align.users-per-step", "32", "--objective.alpha", "0.3", "--data.pages", "recorded"]
        return align.align(align.parse_config(f"{self.out}/policy", options))

    def evaluate(self) -> dict[str, dict[str, Any]]:
        """The policy before and after, by the held-out clicks and by the truth of the world.

        After the last step: by held-out clicks alone, which are not what is rewarded, the start may be best.
        """
        from launch.commands import evaluate

        steps = {"policy": "best", "aligned": "latest"}
        return {
            name: evaluate.evaluate(_at(load_config(f"{self.out}/{name}")), checkpoint=step)["metrics"]
            for name, step in steps.items()
        }


def _at(config: Any) -> Any:
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, cutoffs=(10,)))
