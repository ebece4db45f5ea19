"""What can be known to fail from the options alone, before any worker is started."""

from cluster.elastic import allowed_worlds
from cluster.errors import ConfigError
from trainer.configuration import PretrainConfig


def check(config: PretrainConfig) -> None:
    """Raises: ConfigError naming the option."""
    _at_least_one(config)
    allowed_worlds(config.cluster)
    cutoffs = [f"{metric}@{k}" for metric in ("recall", "ndcg") for k in config.evaluation.cutoffs]
    if config.train.selection_metric not in (*cutoffs, "mrr"):
        raise ConfigError(
            f"train.selection-metric must be one of {', '.join(cutoffs)}, mrr; got "
            f"{config.train.selection_metric}"
        )
    for name in ("workers", "max_workers"):
        workers = getattr(config.cluster, name)
        if workers is not None and workers > config.data.num_streams:
            raise ConfigError(
                f"data.num-streams must be at least cluster.{name.replace('_', '-')} ({workers}), got "
                f"{config.data.num_streams}; it is a property of the run, so choose it for the largest cluster"
            )
    for name in ("model", "objective"):
        if getattr(config, name) is None:
            raise ConfigError(f"{name} must be set by the recipe, and recipe '{config.recipe}' leaves it out")
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
    decay = config.train.ema_decay
    if decay is not None and not 0 <= decay < 1:
        raise ConfigError(f"train.ema-decay must lie in 0..1, below 1, or be None; got {decay}")


def _at_least_one(config: PretrainConfig) -> None:
    for section, names in (
        ("train", ("epochs", "micro_batches", "keep_last", "validate_every_steps", "checkpoint_every_steps")),
        ("cluster", ("workers",)),
        ("log", ("every_steps",)),
    ):
        for name in names:
            value = getattr(getattr(config, section), name)
            if value is not None and value < 1:
                raise ConfigError(f"{section}.{name.replace('_', '-')} must be at least 1, got {value}")
