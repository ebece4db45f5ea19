"""The complete, typed configuration of a pretraining run."""

from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.configuration import ClusterConfig
from cluster.errors import ConfigError
from data_streams.configuration import DataConfig
from sharding.configuration import ShardingConfig

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints inside a run directory."""
PLAN = "plan.txt"
"""What lies where, as a text in a run directory."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long is trained, at which rates, and how a step is computed."""

    epochs: int = 10
    """Passes over all users."""
    max_steps: int | None = None
    """Optimizer steps after which training ends, if that is before the last epoch."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW on the dense parameters."""
    table_learning_rate: float = 0.07
    """Peak rate of row-wise Adagrad on the tables."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the dense parameters."""
    schedule: Literal["cosine", "linear", "inverse-sqrt", "constant"] = "cosine"
    """How both rates go on after the warm-up. A cosine and a line end at the last step planned, so a run that is made
    longer has other rates from there on; inverse-sqrt and constant know no end."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    final_rate_fraction: float = 0.0
    """What both rates fall to, as a fraction of their peaks."""
    max_gradient_norm: float | None = 1.0
    """Clipping of the dense gradient's global norm; None leaves it as it is."""
    ema_decay: float | None = None
    """Decay of the moving average of the weights that evaluation and export use; None evaluates the weights
    themselves. Table rows are not averaged: a step that touches a few of them would have to touch all."""
    micro_batches: int = 1
    """Parts a step is computed in, to fit in memory; the update is the same."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What of the dense part is partitioned over workers: optimizer state (1), gradients (2), parameters (3)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the dense part; auto takes bf16 where the machine computes it natively."""
    activation_checkpointing: bool = False
    """Compute the activations inside each block again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile the model's blocks with torch.compile. On the processors it was measured on, it does not pay."""
    validate_every_steps: int | None = None
    """Steps between validations; None counts epochs."""
    validate_every_epochs: int = 1
    """Epochs between validations where steps are not counted; the last epoch always ends with one."""
    patience: int | None = None
    """Validations in a row that may bring no improvement; the next one without any ends training. None never ends
    early."""
    selection_metric: str = "ndcg@10"
    """Validation metric that decides which checkpoint is best."""
    checkpoint_every_s: float | None = 60.0
    """Seconds between checkpoints."""
    checkpoint_every_steps: int | None = None
    """Optimizer steps between checkpoints."""
    keep_last: int = 2
    """Latest checkpoints that are kept; the best one is kept beside them."""
    audit: bool = True
    """Write down which users each step's loss saw."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Whom evaluation ranks items for, which items, and what is measured."""

    cutoffs: tuple[int, ...] = (5, 10, 20)
    """Lengths of the list at which metrics are taken."""
    filter_seen: bool = True
    """Leave items of the user's known past out of the ranking, but for the held-out one where it is of them."""
    users_per_batch: int = 512
    """Users ranked together by all workers."""
    user_share: float = 1.0
    """Share of the users that is evaluated: drawn by their rows alone, so the same ones for every run and command."""
    held_out_action: str = ""
    """Evaluate only users whose held-out event has this action; left out, all."""
    condition: Literal["none", "attention", "filter"] = "none"
    """What a condition on the wanted items does: attention asks a model trained for it, filter takes other items out of
    the model's list (post-filtering), none leaves all as it is."""
    condition_column: str = ""
    """Item column of the conditions, such as categories; left out, that of the model."""
    conditions: tuple[str, ...] = ()
    """The conditions; left out, the narrowest one that the held-out item meets, which only evaluation knows."""
    objective: str = ""
    """Action, such as purchase, that a model of several objectives (URM) is asked for; left out, click, or where there
    is none the data's first. One that reads text may be asked in any words."""
    exit_confidence: float = 1.0
    """A model with exits (m6-rec-ranking) goes no further with an answer whose yes or no is at least this likely; 1
    goes through all layers."""
    filter_from: int = 10
    """Post-filtering looks at this many times the longest list; a search.width must be as wide."""
    index: Literal["exact", "hnsw"] = "exact"
    """How items are searched: all of them, or by a graph of neighbours (faiss HNSW), which may miss some."""
    bootstrap_resamples: int = 1000
    """User resamples behind each 95 % interval."""

    def __post_init__(self) -> None:
        if not 0 < self.user_share <= 1:
            raise ConfigError(
                f"evaluation.user-share must be above 0 and at most 1, is {self.user_share}; 0.2 takes every fifth user"
            )
        if not 0.5 <= self.exit_confidence <= 1:
            raise ConfigError(
                "evaluation.exit-confidence is the probability of the likelier answer and must lie in 0.5..1, got "
                f"{self.exit_confidence}"
            )
        if not self.cutoffs or min(self.cutoffs) < 1:
            raise ConfigError(
                f"evaluation.cutoffs must be one length of a list or more, each at least 1, got {self.cutoffs}"
            )
        if min(self.users_per_batch, self.filter_from) < 1 or self.bootstrap_resamples < 0:
            raise ConfigError(
                "evaluation.users-per-batch and filter-from must be at least 1 and bootstrap-resamples at least 0, got "
                f"{self.users_per_batch}, {self.filter_from} and {self.bootstrap_resamples}"
            )


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How a model that generates semantic IDs is asked for items; `allow` and `deny` hold for every model."""

    method: Literal["beam", "sample", "gumbel"] = "beam"
    """The most likely paths; or so many draws as the beam would be wide, each item listed once in the order drawn:
    `sample` draws again and again, so that lists get shorter where items come twice, `gumbel` puts nothing back."""
    width: int = 50
    """Prefixes the beam search keeps per user and depth, or draws per user."""
    earlier_widths: tuple[int, ...] = ()
    """The same for each depth before the last, where those keep other numbers than search.width."""
    validation_width: int = 20
    """The same while training."""
    space: Literal["catalogue", "free"] = "catalogue"
    """Walk only through paths of existing items, or through all paths of codes, of which those of no item are then
    counted (hallucination rate) and left out of the lists. Neither walks to items that are filtered."""
    allow: str = ""
    """File of item ids, one a line: no other items are found, by any model."""
    deny: str = ""
    """File of item ids, one a line: these are not found, by any model."""
    over: Literal["all", "allowed"] = "all"
    """What a level's probabilities sum to one over in a beam: all codes, or those the search may take. Draws are always
    from the latter."""
    temperature: float = 1.0
    """Divides the model's scores of every level; above 1 draws vary more."""
    top_k: int | None = None
    """Only the k most likely codes of a prefix can be drawn; left out, all."""
    top_p: float = 1.0
    """Only the most likely codes that hold this much probability together can be drawn."""
    seed: int = 0
    """Seed of the draws; a user's depend on it alone, not on the other users or the number of workers."""
    prm: bool = False
    """Let a process reward model choose the prefixes the beam keeps, and order the result."""
    prm_run: str = ""
    """Run whose process reward model that is; left out, the model's own. For evaluation and serving."""
    candidates: tuple[int, ...] = ()
    """Prefixes per user and depth that it scores; left out, four times the width. Several, in evaluation, are compared,
    beside plain beams as wide."""
    depth_candidates: tuple[int, ...] = ()
    """The same for each depth by itself, instead of one number."""
    prm_depths: tuple[int, ...] = ()
    """Depths, from 1 on, at which it has more candidates than the beam is wide and so chooses; left out, all."""

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and 0 < self.top_p <= 1 and (self.top_k is None or self.top_k >= 1)):
            raise ConfigError(
                "search.temperature must be above 0, search.top-p above 0 and at most 1 and search.top-k at least 1, "
                f"got {self.temperature}, {self.top_p} and {self.top_k}"
            )
        if min(self.earlier_widths, default=1) < 1:
            raise ConfigError(f"search.earlier-widths must be at least 1 each, got {self.earlier_widths}")
        if self.method != "beam" and (self.prm or self.earlier_widths):
            raise ConfigError(
                f"search.prm and search.earlier-widths are of beams, and search.method is {self.method}; leave them "
                "out (--search.no-prm), or say --search.method beam"
            )
        if self.method == "beam" and (self.top_k is not None or self.top_p < 1 or self.seed):
            raise ConfigError(
                "search.top-k, search.top-p and search.seed say what can be drawn; add --search.method sample or "
                "gumbel, or leave them out"
            )
        if self.candidates and min(self.candidates) < self.width:
            raise ConfigError(
                f"search.candidates must not be below search.width ({self.width}), and {min(self.candidates)} is; "
                "raise it, or lower --search.width"
            )
        if (self.candidates or self.depth_candidates or self.prm_run or self.prm_depths) and not self.prm:
            raise ConfigError(
                "search.candidates, search.depth-candidates, search.prm-run and search.prm-depths say how --search.prm "
                "works; add it"
            )
        if self.depth_candidates and (self.candidates or self.prm_depths):
            raise ConfigError(
                "search.depth-candidates must stand without search.candidates and search.prm-depths, which say the "
                "same; leave either out"
            )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the numbers of a run go."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Report to Weights & Biases."""
    project: str = "grail"
    """Weights & Biases project."""
    every_steps: int = 20
    """Steps between two lines of metrics.jsonl."""
    prometheus_file: str | None = None
    """File on this machine to keep the newest numbers in as Prometheus reads them, such as one in the folder of
    node_exporter's textfile collector; its name must end in .prom."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pretraining run, as a recipe returns it and config.yaml keeps it."""

    recipe: str = ""
    """Name of the recipe this run was started from."""
    run_dir: str = ""
    """Folder or address of everything the run writes; left out, runs/RECIPE."""
    seed: int = 0
    """Seed of all randomness: initial weights, order of users, dropout, negatives."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on where the run directory holds a checkpoint; never insists on an empty one."""
    init_from: str | None = None
    """Run directory whose weights (and nothing else) this run starts from."""
    profile: bool = False
    """Trace a few steps with torch.profiler into the run directory."""
    data: DataConfig = field(default_factory=DataConfig)
    model: Any = None
    """Config of the model; its type chooses the model."""
    objective: Any = None
    """Config of the training objective; its type chooses the objective. None for a model with a loss of its own."""
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    log: LogConfig = field(default_factory=LogConfig)
