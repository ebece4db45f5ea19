"""The complete, typed configuration of an alignment."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.configuration import ClusterConfig, check_one_accelerator, check_resources, check_seconds
from cluster.errors import ConfigError
from data_streams.configuration import DataConfig
from data_streams.stream import history_share, open_data
from data_streams.token_budget import tokens_per_epoch
from rl.guards import Alarm
from rl.reward_mix import RewardTerm, check_terms
from rl.reward_pool import RewardPoolConfig
from sharding.configuration import ShardingConfig
from trainer.configuration import EvaluationConfig, LogConfig, PretrainConfig, SearchConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class AlignOptions:
    """RECONSTRUCTED where the papers are silent: 16 completions at temperature 1 as industrial.md 1.4 proposes."""

    users_per_step: int = 64
    """Prompts of one update over all workers, about: the data's token budget is set to the mean length of so many."""
    group_size: int = 16
    """Completions of each prompt."""
    temperature: float = 1.0
    """Divides the scores of every level, where completions are drawn and where their probabilities are computed."""
    draws: Literal["independent", "distinct", "beam"] = "independent"
    """Each completion by itself, so that likely ones come several times; all of a prompt different, drawn without
    putting back; or the likeliest ones, by a beam as wide as the group."""
    space: Literal["free", "catalogue"] = "free"
    """Draw among all paths of codes, so that illegal ones can be unlearnt, or among those of existing items only."""
    max_staleness: int = 0
    """Updates a completion may be older than the policy that learns from it; 1 draws the next ones during an update."""
    stop_on: tuple[Alarm, ...] = ()
    """Warnings that end the run; a stopped run keeps its best checkpoint and can go on."""

    def __post_init__(self) -> None:
        if self.users_per_step < 1 or self.group_size < 2:
            raise ConfigError(
                "align.users-per-step must be at least 1 and align.group-size at least 2, since completions are "
                f"compared with each other; got {self.users_per_step} and {self.group_size}"
            )
        if not self.temperature > 0 or not 0 <= self.max_staleness <= 1:
            raise ConfigError(
                "align.temperature must be above 0 and align.max-staleness 0 or 1, got "
                f"{self.temperature} and {self.max_staleness}"
            )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Where completions are drawn, and how long workers that draw are waited for."""

    workers: int = 1
    """Processes that draw completions; with 0 the learners draw them themselves."""
    cpus_per_worker: float = 1.0
    """Processor cores reserved for each."""
    gpus_per_worker: float = 0.0
    """Accelerators reserved for each, 1 or a fraction; 0 draws on the processor."""
    weights: Literal["object-store", "broadcast"] = "object-store"
    """How they get new weights: each reads them from Ray's object store, or the first learner sends them to all at
    once, by NCCL where it and the workers have an accelerator each, by gloo otherwise."""
    wait_s: float = 60.0
    """How long a run waits for a rollout worker when all have died; then it stops and can be resumed."""
    timeout_s: float = 600.0
    """How long a worker may take for the prompts it was given; then it is replaced, and another draws for them."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"rollout.workers must be at least 0, got {self.workers}")
        check_resources("rollout", cpus=self.cpus_per_worker, gpus=self.gpus_per_worker)
        check_one_accelerator("rollout", self.gpus_per_worker)
        check_seconds("rollout.timeout-s", self.timeout_s)
        if self.weights == "broadcast" and not self.workers:
            raise ConfigError(
                "rollout.weights broadcast is between a learner and its rollout workers, and rollout.workers is 0; "
                "give --rollout.workers 1 or more"
            )


def _train() -> TrainConfig:
    """Probabilities of drawing and of learning are compared, so arithmetic is fp32 unless asked for otherwise."""
    return TrainConfig(
        epochs=1,
        learning_rate=1e-4,
        table_learning_rate=0.0,
        warmup_steps=5,
        precision="fp32",
        validate_every_steps=20,
    )


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """An alignment: the policy it starts from, what is rewarded, and how the policy learns from that."""

    start: str = ""
    """Run directory of the pretrained policy; its best checkpoint is where alignment starts."""
    run_dir: str = ""
    """Folder or address of everything the alignment writes; left out, START-aligned."""
    seed: int = 0
    """Seed of the order of prompts and of all draws."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on where the run directory holds a checkpoint; never insists on an empty one."""
    objective: Any = None
    """Config of the objective; its type chooses it."""
    advantage: Any = None
    """Config of the advantage; its type chooses it."""
    rewards: tuple[RewardTerm, ...] = ()
    """What completions are rewarded for."""
    align: AlignOptions = field(default_factory=AlignOptions)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardPoolConfig = field(default_factory=RewardPoolConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=_train)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def num_cpus(self) -> float:
        """Cores that learners, rollout and reward workers reserve together."""
        return (
            self.cluster.workers * self.cluster.cpus_per_worker
            + self.rollout.workers * self.rollout.cpus_per_worker
            + self.reward.workers * self.reward.cpus_per_worker
        )

    def num_gpus(self) -> float:
        """Accelerators that they reserve together."""
        return (
            self.cluster.workers * self.cluster.gpus_per_worker
            + self.rollout.workers * self.rollout.gpus_per_worker
            + self.reward.workers * self.reward.gpus_per_worker
        )

    def policy(self, start: PretrainConfig) -> PretrainConfig:
        """The run that alignment makes out of the one it starts from: evaluated and served like any other.

        Dropout is left out: the probability of a completion must be the one it was drawn with.
        """
        model = start.model
        if any(entry.name == "dropout" for entry in dataclasses.fields(model)):
            model = dataclasses.replace(model, dropout=0.0)
        sections = ("train", "sharding", "evaluation", "search", "cluster", "log")
        return dataclasses.replace(
            start,
            run_dir=self.run_dir,
            data=with_users_per_step(self.data, self.align.users_per_step),
            seed=self.seed,
            resume=self.resume,
            init_from=start.run_dir,
            model=model,
            **{name: getattr(self, name) for name in sections},
        )


def with_users_per_step(data: DataConfig, users: int) -> DataConfig:
    """The same data with a token budget of so many users of mean length."""
    _, manifest = open_data(data)
    num_users = sum(count for length, count in manifest.train_length_counts.items() if length > 1)
    tokens = tokens_per_epoch(manifest, data.max_length, history_share(manifest, data))
    return dataclasses.replace(data, tokens_per_step=max(round(users * tokens / max(num_users, 1)), 1))


def check_alignment(config: AlignConfig, start: PretrainConfig) -> None:
    """What can be known to fail from the options alone, before any worker is started.

    Raises: ConfigError naming the option.
    """
    if not getattr(start.model, "needs_semantic_ids", False):
        raise ConfigError(
            f"alignment needs a policy that generates semantic IDs, and {start.run_dir} holds a "
            f"{type(start.model).__qualname__.split('.')[0]}; pretrain a recipe such as decoder-amazon"
        )
    if not getattr(start.model, "proposes_codes", True):
        raise ConfigError(
            f"alignment changes the probabilities of codes, and the {type(start.model).__qualname__.split('.')[0]} in "
            f"{start.run_dir} has none: it scores given nodes; pretrain a recipe such as decoder-amazon"
        )
    if config.cluster.in_process:
        raise ConfigError(
            "alignment works with rollout and reward workers, which Ray places; leave --cluster.in-process out"
        )
    for name in ("min_workers", "max_workers"):
        if getattr(config.cluster, name) not in (None, config.cluster.workers):
            raise ConfigError(
                f"cluster.{name.replace('_', '-')} is for pretraining, and alignment keeps its "
                f"{config.cluster.workers} learners beside their rollout and reward workers; leave it out"
            )
    _check_no_gpu_is_shared(config)
    check_terms(config.rewards)
    for term in config.rewards:
        if term.reward.reads_positive_features and config.data.pages != "none":
            raise ConfigError(
                f"the reward {term.name} reads columns of the observed item, and prompts of pages do not carry any; "
                "give --data.pages none"
            )
    of_codes = any(term.reward.rewards_codes for term in config.rewards if not term.direct)
    config.advantage.build().check_rewards(of_codes=of_codes)
    objective = config.objective.build()
    if config.align.max_staleness and not objective.learns_from_older:
        raise ConfigError(
            f"align.max-staleness 1 needs an objective that learns from completions of an older policy, and "
            f"{type(objective).__name__} does not: its ratio is 1 whatever drew; use ecpo, gbpo or grpo, or leave "
            "--align.max-staleness at 0"
        )
    if config.align.max_staleness and not config.rollout.workers:
        raise ConfigError(
            "align.max-staleness 1 draws the next completions during an update, and learners that draw themselves "
            "cannot; give --rollout.workers 1 or more"
        )


def _check_no_gpu_is_shared(config: AlignConfig) -> None:
    shares = config.cluster.gpus_per_worker, config.rollout.gpus_per_worker
    if config.rollout.weights == "broadcast" and min(shares) > 0 and min(shares) < 1:
        raise ConfigError(
            "rollout.weights broadcast over NCCL needs an accelerator of its own for every process, and "
            f"cluster.gpus-per-worker {shares[0]:g} with rollout.gpus-per-worker {shares[1]:g} let some share one; "
            "give whole ones, or --rollout.weights object-store"
        )
