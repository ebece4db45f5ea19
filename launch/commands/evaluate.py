"""Rank the held-out items of all users with a run's weights: grail evaluate RUN_DIR [options]"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.configuration import ClusterConfig
from cluster.errors import ConfigError
from cluster.storage import Storage
from launch.config_document import to_document
from launch.progress import start_console
from launch.run_directory import (
    EVALUATION,
    SEARCH_SCALING,
    absolute,
    folder_and_name,
    load_config,
    require_ending,
)
from launch.served_run import DataOptions, asked_alike, checkpoint_name, find_step, parse_served
from trainer.configuration import EvaluationConfig, PretrainConfig, SearchConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Rank the held-out items of all users with a run's weights."""

    checkpoint: str = "best"
    """latest, best or the number of a step."""
    split: Literal["valid", "test"] = "test"
    """Which held-out items are ranked."""
    baselines: bool = False
    """Evaluate popularity, co-occurrence and transitions beside it, and the oracle where the truth is known."""
    per_user: str | None = None
    """Parquet file that each user's own metrics are written to, to compare two runs user by user."""
    beside: tuple[str, ...] = ()
    """Runs over the same semantic IDs, larger ones perhaps, whose plain beams stand in the table of several
    --search.candidates."""
    data: DataOptions = field(default_factory=DataOptions)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def run(arguments: list[str]) -> int:
    config, options = parse_served("evaluate", arguments, EvaluateOptions)
    if len(config.search.candidates) > 1:
        if options.baselines or options.per_user:
            raise ConfigError(
                "several --search.candidates are compared in one table without --baselines and --per-user; give one "
                "number of candidates, or leave those out"
            )
        if config.evaluation.condition != "none":
            raise ConfigError(
                "several --search.candidates are compared by the prefixes they find, which filtering does not tell; "
                "give one number of candidates, or --evaluation.condition none"
            )
        compare_candidates(config, checkpoint=options.checkpoint, split=options.split, beside=options.beside)
        return 0
    if options.beside:
        raise ConfigError(
            "--beside puts other runs into the table of several --search.candidates; give two numbers or more"
        )
    evaluate(
        config,
        checkpoint=options.checkpoint,
        split=options.split,
        baselines=options.baselines,
        per_user=options.per_user,
    )
    return 0


def evaluate(
    config: PretrainConfig,
    *,
    checkpoint: str = "best",
    split: str = "test",
    baselines: bool = False,
    per_user: str | None = None,
) -> dict[str, Any]:
    """Evaluate a run on workers, write its evaluation.json and print a table; returns the file's content."""
    from rich.console import Console

    from cluster.workers import run_workers
    from launch.jobs import evaluate_job
    from launch.report import write_report
    from trainer.evaluate import EvaluationResult, render
    from trainer.slices import render_slices

    if baselines:
        _check_baselines(config)
    if _scores_given_items(config):
        _check_given_items(config, per_user)
    step = find_step(config, checkpoint)
    kept = per_user and _prepared(per_user)
    start_console()
    content = run_workers(
        *(evaluate_job, config, step, split, kept), config=config.cluster, run_dir=config.run_dir
    )
    content["checkpoint"] = checkpoint = checkpoint_name(config, checkpoint)
    intervals = {metric: tuple(interval) for metric, interval in content["intervals"].items()}
    results = {f"step {step} ({checkpoint})": EvaluationResult(**{**content, "intervals": intervals})}
    if baselines:
        results |= _baselines(config, split)
        content["baselines"] = {
            name: dict(result.metrics) for name, result in results.items() if result.step is None
        }
    content["settings"] = _settings(config)
    storage = Storage(config.run_dir)
    storage.write(EVALUATION, json.dumps(content, indent=1).encode())
    Console().print(render(results))
    if content["slices"]:
        Console().print(render_slices(content["slices"]))
    if narrowing := _narrowing(config):
        print(f"Narrowed by {', '.join(narrowing)}; all settings are in {EVALUATION}")
    print(f"Written to {storage.path(EVALUATION)} and {write_report(config.run_dir)}")
    return content


def compare_candidates(
    config: PretrainConfig, *, checkpoint: str, split: str, beside: Sequence[str] = ()
) -> None:
    """Test-time scaling: write search_scaling.json and .png into the run directory and print a table."""
    from rich.console import Console

    from cluster.workers import run_workers
    from launch.jobs import scaling_job
    from launch.plots import write_scaling
    from launch.report import write_report
    from trainer.search_scaling import render_scaling

    step = find_step(config, checkpoint)
    others = [asked_alike(load_config(run), config) for run in beside]
    served = [(other, find_step(other, "best")) for other in others]
    start_console()
    lines = run_workers(
        *(scaling_job, config, step, split, served),
        config=config.cluster,
        run_dir=config.run_dir,
    )
    storage = Storage(config.run_dir)
    content = {"step": step, "split": split, "width": config.search.width, "searches": lines}
    storage.write(SEARCH_SCALING, json.dumps(content, indent=1).encode())
    console = Console()
    console.print(render_scaling(lines, console.width))
    picture = write_scaling(config.run_dir, lines)
    print(f"Written to {storage.path(SEARCH_SCALING)}, {picture} and {write_report(config.run_dir)}")


def _scores_given_items(config: PretrainConfig) -> bool:
    generates = getattr(config.model, "needs_semantic_ids", False)
    return getattr(config.model, "has_own_objective", False) and not generates


def _check_given_items(config: PretrainConfig, per_user: str | None) -> None:
    """Raises: ConfigError for options that only say something of a ranking of all items."""
    if per_user:
        raise ConfigError(
            "--per-user keeps how each user's held-out item is ranked, and this run's model scores given ones; "
            "leave it out"
        )
    if config.evaluation.held_out_action:
        raise ConfigError(
            "evaluation.held-out-action chooses users by the event that is to be found, and this run's model scores "
            "given items, with metrics for each action; leave it out"
        )
    if config.evaluation.index != "exact":
        raise ConfigError(
            f"evaluation.index {config.evaluation.index} searches all items, and this run's model scores given ones; "
            "say --evaluation.index exact"
        )
    if narrowing := _narrowing(config):
        raise ConfigError(
            f"{' and '.join(narrowing)} would narrow a search of all items, and this run's model scores given ones; "
            "leave them out"
        )


def _settings(config: PretrainConfig) -> dict[str, Any]:
    """What the numbers depend on beside the weights."""
    document = to_document(config)
    data = {name: document["data"][name] for name in ("path", "semantic_ids", "max_length", "feedback_lag_s")}
    return {"data": data, "evaluation": document["evaluation"], "search": document["search"]}


def _narrowing(config: PretrainConfig) -> list[str]:
    """Options that are given and narrow what is searched."""
    given = {
        "evaluation.condition": config.evaluation.condition != "none",
        "search.allow": bool(config.search.allow),
        "search.deny": bool(config.search.deny),
    }
    return [name for name, is_given in given.items() if is_given]


def _prepared(per_user: str) -> str:
    """The file named from the root on, in a folder that is there.

    Raises: ConfigError where no file can be written.
    """
    path = absolute(per_user)
    refused = f"--per-user must be a file that can be written, got {per_user}"
    if Path(path).is_dir():
        raise ConfigError(f"{refused}, which is a folder; name a file in it")
    require_ending(path, ".parquet", "--per-user")
    try:
        Storage(folder_and_name(path)[0]).make_directory()
    except OSError as error:
        raise ConfigError(f"{refused}: {error}; name a file elsewhere") from error
    return path


def _check_baselines(config: PretrainConfig) -> None:
    """Raises: ConfigError where baselines would not be ranked as the run is."""
    if _scores_given_items(config):
        raise ConfigError(
            "baselines rank all items, and this run's model scores given ones; leave --baselines out"
        )
    if narrowing := _narrowing(config):
        raise ConfigError(
            f"baselines rank all items, and {' and '.join(narrowing)} would narrow the run's own search alone; leave "
            "--baselines out, or evaluate without"
        )


def _baselines(config: PretrainConfig, split: str) -> dict[str, Any]:
    import torch

    from launch.world_truth import load_truth
    from trainer.baselines import evaluate_baselines

    truth = load_truth(config.data.path, split)
    if truth is None:
        return evaluate_baselines(config.data, config.evaluation, split=split)
    return evaluate_baselines(
        config.data,
        config.evaluation,
        split=split,
        oracle=lambda batch: torch.from_numpy(truth.oracle_scores(batch.user_ids.numpy())),
        utilities=truth.utilities,
    )
