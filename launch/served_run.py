"""Options of the commands that use a finished or running run: its own configuration, with a few overrides."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import ConfigError
from cluster.storage import Storage
from launch.options import parse, split_name
from launch.run_directory import CHECKPOINTS, absolute, absolute_search, load_config, parse_checkpoint
from trainer.checks import check_search
from trainer.configuration import PretrainConfig

SECTIONS = ("data", "evaluation", "search", "cluster")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What may differ from the data the run was trained on."""

    path: str = ""
    """Folder or address of the shards, if not the one the run was trained on."""
    semantic_ids: str = ""
    """Folder of the table of semantic IDs, if not the one the run was trained with: of a larger catalogue, one that
    `grail tokenize add` has made from it."""
    feedback_lag_s: float = 0.0
    """Seconds before a held-out event that its history lacks, as where feedback comes in late."""
    on_bad_shard: Literal["fail", "skip"] = "fail"
    """What a damaged or missing chunk does: end the run with its name, or be counted and logged."""

    def __post_init__(self) -> None:
        if self.feedback_lag_s < 0:
            raise ConfigError(f"data.feedback-lag-s must be at least 0, got {self.feedback_lag_s}")


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """How items are found for a list, and which may stand in it."""

    filter_seen: bool = True
    """Leave items of the user's known past out of the lists."""
    users_per_batch: int = 512
    """Users served together by all workers."""
    filter_from: int = 10
    """A filter of conditions looks at this many times the list; a search.width must be as wide."""
    index: Literal["exact", "hnsw"] = "exact"
    """How items are searched: all of them, or by a graph of neighbours (faiss HNSW), which may miss some."""
    objective: str = ""
    """Action, such as purchase, that a model of several objectives (URM) is asked for; left out, click, or where there
    is none the data's first action. One that reads text may be asked in any words."""


def parse_served(command: str, arguments: list[str], form: type) -> tuple[PretrainConfig, Any]:
    """The configuration of the run named first, with its sections overridden, and the command's own options.

    `form` is a dataclass of options; its fields `data`, `evaluation`, `search` and `cluster`, where it has them, start
    from the run's.

    Raises: ConfigError if no run is named; CheckpointError if there is none at that place.
    """
    name, rest = split_name(arguments)
    program = f"grail {command} RUN_DIR"
    if name is None:
        if not {"-h", "--help"} & set(rest):
            raise ConfigError(f"grail {command} needs a run directory in front of the options")
        parse(form, ["--help"], program=program)
    trained = config = load_config(name)
    options = parse(form, rest, program=program, default=_with_sections(form, config))
    for section in SECTIONS:
        if hasattr(options, section):
            config = _override(config, section, getattr(options, section))
    _check_search(config, trained)
    _check_condition(config, trained)
    return config, options


def find_step(config: PretrainConfig, checkpoint: str) -> int:
    """The step that `--checkpoint latest|best|STEP` means now, found before any worker is started.

    Raises: ConfigError if it is none of these; CheckpointError if there is no such checkpoint.
    """
    from trainer.checkpoint_reader import CheckpointReader

    chosen = parse_checkpoint(checkpoint)
    return CheckpointReader(Storage(f"{config.run_dir}/{CHECKPOINTS}"), chosen).step


def checkpoint_name(config: PretrainConfig, checkpoint: str) -> str:
    """What is served under that name: where nothing was validated, the latest stands in for the best."""
    from trainer.checkpoint_pointers import BEST, read_pointer

    has_best = read_pointer(Storage(f"{config.run_dir}/{CHECKPOINTS}"), BEST) is not None
    return "latest" if checkpoint == "best" and not has_best else checkpoint


def asked_alike(config: PretrainConfig, other: PretrainConfig) -> PretrainConfig:
    """A run's configuration, evaluated as another run is, on its data and by its search; with its own semantic IDs."""
    names = (entry.name for entry in dataclasses.fields(DataOptions) if entry.name != "semantic_ids")
    served = {name: getattr(other.data, name) for name in names}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **served),
        evaluation=other.evaluation,
        search=other.search,
        cluster=other.cluster,
    )


def _check_search(config: PretrainConfig, trained: PretrainConfig) -> None:
    """Raises: ConfigError for options of semantic IDs and their search where the model has none, and the reverse."""
    if getattr(config.model, "needs_semantic_ids", False):
        if (index := config.evaluation.index) != trained.evaluation.index:
            raise ConfigError(
                f"evaluation.index {index} is for models that rank their items one by one, and a "
                f"{type(config.model).__qualname__.split('.')[0]} walks to them; leave it out"
            )
    check_search(config, trained)


def _check_condition(config: PretrainConfig, trained: PretrainConfig) -> None:
    """Raises: ConfigError for a column that is named and would not be read."""
    column = config.evaluation.condition_column
    if config.evaluation.condition == "none" and column != trained.evaluation.condition_column:
        raise ConfigError(
            f"evaluation.condition-column {column} says what --evaluation.condition filter (or attention, for a model "
            "trained for that column) goes by; add it, or leave the column out"
        )


def _with_sections(form: type, config: PretrainConfig) -> Any:
    """The command's defaults with the run's sections in place."""
    default = form()
    for section in SECTIONS:
        if hasattr(default, section):
            chosen = getattr(default, section)
            values = {
                entry.name: getattr(getattr(config, section), entry.name)
                for entry in dataclasses.fields(chosen)
            }
            default = dataclasses.replace(default, **{section: dataclasses.replace(chosen, **values)})
    return default


def _override(config: PretrainConfig, section: str, given: Any) -> PretrainConfig:
    values = {entry.name: getattr(given, entry.name) for entry in dataclasses.fields(given)}
    values |= {name: absolute(values[name]) for name in ("path", "semantic_ids") if name in values}
    changed = dataclasses.replace(getattr(config, section), **values)
    if section == "search":
        changed = absolute_search(changed)
    return dataclasses.replace(config, **{section: changed})
