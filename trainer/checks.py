"""What can be known to fail from the options alone, before any worker is started."""

import dataclasses
import math

from cluster.elastic import allowed_worlds
from cluster.errors import ConfigError
from trainer.configuration import PretrainConfig, TrainConfig

FOR_ANY_MODEL = ("allow", "deny")
"""Options of a search that work without semantic IDs too."""


def check(config: PretrainConfig) -> None:
    """Raises: ConfigError naming the option."""
    _at_least_one(config)
    cutoffs = [f"{metric}@{k}" for metric in ("recall", "ndcg") for k in config.evaluation.cutoffs]
    metrics = getattr(config.model, "selection_metrics", (*cutoffs, "mrr"))
    if config.train.selection_metric not in metrics:
        raise ConfigError(
            f"train.selection-metric must be one of {', '.join(metrics)}; got {config.train.selection_metric}"
        )
    _check_workers(config)
    _check_needs_of_model(config)
    check_search(config, PretrainConfig())
    if getattr(config.model, "needs_semantic_ids", False) and config.evaluation.condition != "none":
        raise ConfigError(
            f"evaluation.condition {config.evaluation.condition} is for evaluation and serving where a model generates "
            "items, since training validates with a narrow beam; leave it out, and give it to grail evaluate"
        )
    if config.search.prm_run:
        raise ConfigError(
            "search.prm-run is for evaluation and serving, and training validates with the model alone; leave it out"
        )
    missing = [name for name in getattr(config.model, "event_columns", ()) if name not in config.data.columns]
    if missing:
        raise ConfigError(
            f"data.columns must name the event columns the model reads, and {', '.join(missing)} is missing from "
            f"{config.data.columns}"
        )
    if (prometheus := config.log.prometheus_file) is not None and not prometheus.endswith(".prom"):
        raise ConfigError(
            f"log.prometheus-file must end in .prom, as node_exporter wants it; got {prometheus}"
        )
    _check_rates(config.train)
    _check_numbers_of_start(config)
    if not 0 <= (smoothing := getattr(config.model, "label_smoothing", 0.0)) < 1:
        raise ConfigError(f"model.label-smoothing must be at least 0 and below 1, got {smoothing}")


def _check_needs_of_model(config: PretrainConfig) -> None:
    for name in ("model", "objective"):
        if getattr(config, name) is None and not getattr(config.model, "has_own_objective", False):
            raise ConfigError(f"{name} must be set by the recipe, and recipe '{config.recipe}' leaves it out")
    if config.objective is not None and getattr(config.model, "has_own_objective", False):
        raise ConfigError(
            f"{type(config.model).__qualname__} has a loss of its own; leave --objective out of recipe "
            f"'{config.recipe}'"
        )
    if getattr(config.model, "needs_semantic_ids", False) and not config.data.semantic_ids:
        raise ConfigError(
            f"{type(config.model).__qualname__.split('.')[0]} finds items by semantic IDs and needs "
            "--data.semantic-ids, the folder of their table; make one with "
            f"{getattr(config.model, 'semantic_ids_command', 'grail tokenize')}"
        )
    if getattr(config.model, "has_frozen_base", False) and not (config.model.pretrained or config.init_from):
        raise ConfigError(
            f"model.tuning {config.model.tuning} keeps the language model frozen as it is, so it needs one that has "
            "learnt: --init-from RUN of a run with --model.tuning full, or --model.pretrained"
        )
    if getattr(config.model, "needs_exposures", False) and not config.data.history_exposures:
        raise ConfigError(
            f"{type(config.model).__qualname__.split('.')[0]} learns from exposures, and "
            "needs --data.history-exposures; histories hold none otherwise"
        )
    if config.data.history_exposures and not getattr(config.model, "needs_exposures", False):
        raise ConfigError(
            "data.history-exposures is for models of how users answer what they are shown, and "
            f"{type(config.model).__qualname__.split('.')[0]} finds items: what a page showed would stand in front of "
            "what was taken from it, so that evaluations would know the answer; leave it out"
        )
    if getattr(config.model, "needs_pages", False) and config.data.pages == "none":
        raise ConfigError(
            f"{type(config.model).__qualname__.split('.')[0]} learns whole pages and needs --data.pages (auto, "
            "recorded, gap or count); give it, or --model.target item"
        )


def check_search(config: PretrainConfig, usual: PretrainConfig) -> None:
    """Raises: ConfigError for unusual options of semantic IDs and their search where the model has none, and for those
    that a PRM alone cannot be searched with.
    """
    if getattr(config.model, "needs_semantic_ids", False):
        if getattr(config.model, "needs_prm", False):
            _check_search_by_prm(config)
        return
    names = (entry.name for entry in dataclasses.fields(config.search) if entry.name not in FOR_ANY_MODEL)
    given = [
        f"search.{name}" for name in names if getattr(config.search, name) != getattr(usual.search, name)
    ]
    if config.data.semantic_ids != usual.data.semantic_ids:
        given.append("data.semantic_ids")
    if given:
        raise ConfigError(
            f"{', '.join(given).replace('_', '-')} is for models that generate semantic "
            f"IDs, and a {type(config.model).__qualname__.split('.')[0]} ranks its items one by one; leave it out "
            "(search.allow and search.deny work for any model)"
        )


def _check_search_by_prm(config: PretrainConfig) -> None:
    """To a PRM alone all codes are equally likely: others that choose would take the first, whoever the user is."""
    name = type(config.model).__qualname__.split(".")[0]
    if not config.search.prm:
        raise ConfigError(
            f"a {name} proposes no codes, so that only its process reward model finds items; say --search.prm"
        )
    narrowing = [
        f"search.{option}"
        for option in ("candidates", "depth_candidates", "prm_depths")
        if getattr(config.search, option)
    ]
    if narrowing:
        raise ConfigError(
            f"{' and '.join(narrowing).replace('_', '-')} would have the likeliest prefixes scored alone, and to a "
            f"{name} all are equally likely; leave it out, and all are scored"
        )


def _check_rates(train: TrainConfig) -> None:
    rates = ("learning_rate", "table_learning_rate", "final_rate_fraction")
    for name in (*rates, "weight_decay", "warmup_steps"):
        if not 0 <= (value := getattr(train, name)) < math.inf:
            raise ConfigError(f"train.{name.replace('_', '-')} must be at least 0, got {value}")
    if train.schedule == "constant" and train.final_rate_fraction:
        raise ConfigError(
            "train.final-rate-fraction is what rates fall to, and train.schedule constant keeps them; leave either out"
        )
    norm = train.max_gradient_norm
    if norm is not None and not norm > 0:
        raise ConfigError(
            f"train.max-gradient-norm must be above 0, or None, which turns clipping off; got {norm}"
        )
    decay = train.ema_decay
    if decay is not None and not 0 <= decay < 1:
        raise ConfigError(f"train.ema-decay must lie in 0..1, below 1, or be None; got {decay}")


def _check_numbers_of_start(config: PretrainConfig) -> None:
    """What the first weights are drawn with."""
    if config.seed < 0:
        raise ConfigError(f"seed must be at least 0, got {config.seed}")
    if (width := getattr(config.model, "width", None)) is not None and width < 1:
        raise ConfigError(f"model.width must be at least 1, got {width}")
    if not 0 <= (scale := getattr(config.model, "init_scale", 0.0)) < math.inf:
        raise ConfigError(f"model.init-scale must be at least 0, got {scale}")


def _check_workers(config: PretrainConfig) -> None:
    for name in ("workers", "max_workers"):
        workers = getattr(config.cluster, name)
        if workers is not None and workers > config.data.num_streams:
            raise ConfigError(
                f"data.num-streams must be at least cluster.{name.replace('_', '-')} ({workers}), got "
                f"{config.data.num_streams}; it is a property of the run, so choose it for the largest cluster"
            )
    _check_experts(config)
    allowed_worlds(config.cluster, multiple_of=config.sharding.workers_multiple_of)


def _check_experts(config: PretrainConfig) -> None:
    size, workers, stage = config.sharding.expert_parallel, config.cluster.workers, config.train.zero_stage
    if workers % size:
        raise ConfigError(
            f"sharding.expert-parallel must divide cluster.workers, and {size} does not divide {workers}; use a "
            f"multiple of {size} workers"
        )
    if size > 1 and stage not in (1, 2):
        raise ConfigError(
            f"train.zero-stage must be 1 or 2 where experts are spread over workers, got {stage} with "
            f"sharding.expert-parallel {size}; use --train.zero-stage 1, or --sharding.expert-parallel 1"
        )


def _at_least_one(config: PretrainConfig) -> None:
    for section, names in (
        (
            "train",
            ("epochs", "max_steps", "patience", "micro_batches", "keep_last", "checkpoint_every_steps"),
        ),
        ("train", ("validate_every_steps", "validate_every_epochs")),
        ("data", ("attribute_rows",)),
        ("cluster", ("workers",)),
        ("search", ("width", "validation_width")),
        ("sharding", ("expert_parallel",)),
        ("log", ("every_steps",)),
    ):
        for name in names:
            value = getattr(getattr(config, section), name)
            if value is not None and value < 1:
                raise ConfigError(f"{section}.{name.replace('_', '-')} must be at least 1, got {value}")
