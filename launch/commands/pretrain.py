"""Train a recipe, or go on with a run: grail pretrain RECIPE|CONFIG.yaml [options]"""

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError
from cluster.plugins import first_line, load_plugin, plugin_config, plugin_files, suggestion
from cluster.reporter import StopSignal, to_all
from cluster.storage import Storage
from launch.options import RECIPES, parse, require_name, split_name, take_option
from launch.progress import TrainingProgress, start_console
from launch.run_directory import (
    CONFIG,
    KeptDocuments,
    absolute,
    absolute_search,
    load_config,
    prepare,
    require_own_folder,
    way_on,
)
from trainer.checks import check
from trainer.configuration import PretrainConfig

if TYPE_CHECKING:
    from launch.run_status import StatusKeeper

OBJECTIVES = "models.objectives"
STOPPED = 75


def run(arguments: list[str]) -> int:
    name, options = split_name(arguments)
    if name is None:
        return _show_recipes(options)
    return train(parse_config(name, options))


def parse_config(name: str, options: list[str]) -> PretrainConfig:
    """The configuration of a recipe or a YAML file, overridden by the options.

    Raises: ConfigError if there is no such recipe, or the options cannot work together.
    """
    default = _default(name)
    objective, options = take_option(options, "--objective")
    if objective is not None:
        default = dataclasses.replace(default, objective=_objective(objective))
    config = parse(PretrainConfig, options, program=f"grail pretrain {name}", default=default)
    run_dir = config.run_dir or f"runs/{config.recipe}"
    return dataclasses.replace(
        config,
        run_dir=absolute(run_dir),
        init_from=config.init_from and absolute(config.init_from),
        model=_with_absolute_folder(config.model),
        data=dataclasses.replace(
            config.data,
            path=absolute(config.data.path),
            semantic_ids=absolute(config.data.semantic_ids),
            columns=_columns(config),
        ),
        search=absolute_search(config.search),
    )


def _objective(name: str) -> Any:
    require_name("objective", name, objective_names())
    return plugin_config(OBJECTIVES, name)()


def _with_absolute_folder(model: Any) -> Any:
    pretrained = getattr(model, "pretrained", "")
    return dataclasses.replace(model, pretrained=absolute(pretrained)) if pretrained else model


def _columns(config: PretrainConfig) -> tuple[str, ...]:
    """The event columns that were asked for and those the model reads."""
    needed = getattr(config.model, "event_columns", ())
    return tuple(dict.fromkeys((*config.data.columns, *needed)))


def train(config: PretrainConfig) -> int:
    """Run a configuration on its workers; the exit code: 0 when finished, 75 when stopped to be resumed.

    Raises: ConfigError or DataError before any worker is started, and whatever the workers raise.
    """
    from cluster.lease import Lease
    from data_streams.stream import open_data
    from launch.plots import write_curves
    from launch.report import write_report
    from launch.run_status import StatusKeeper

    check(config)
    require_own_folder(config.run_dir, alignment=False)
    open_data(config.data)
    console, stop = start_console(), StopSignal()
    keeper = StatusKeeper(config.run_dir, config.recipe, config.log.prometheus_file)
    with stop.on_signals(), Lease(config.run_dir, stop.abort), keeper:
        document = prepare(config)
        result = _run(config, document, console, stop, keeper)
        curves = write_curves(config.run_dir, config.train.selection_metric)
    report = write_report(config.run_dir)
    if result is None or result["status"] == "stopped":
        at = f" at step {result['step']}" if result else ""
        print(f"Stopped{at}. {way_on(config.run_dir, CONFIG, document)}", file=sys.stderr)
        return STOPPED
    _tell(config, result, curves, report)
    return 0


def _run(
    config: PretrainConfig, document: dict, console: Any, stop: StopSignal, keeper: "StatusKeeper"
) -> dict | None:
    """The result of the workers; None where they were stopped before they had one."""
    from cluster.elastic import allowed_worlds
    from cluster.workers import run_workers
    from launch.jobs import pretrain_job

    documents = KeptDocuments(config.run_dir, {CONFIG: document})
    with TrainingProgress(console) as progress:
        result = run_workers(
            *(pretrain_job, config, document),
            config=config.cluster,
            run_dir=config.run_dir,
            on_event=to_all(progress, keeper, documents),
            stop=stop,
            worlds=allowed_worlds(config.cluster, multiple_of=config.sharding.workers_multiple_of),
        )
    if result is not None:
        keeper.end(result["status"])
    return result


def _tell(config: PretrainConfig, result: dict, curves: str | None, report: str) -> None:
    print(f"Finished at step {result['step']}, after {result['epoch']} whole epochs.")
    if result["best"] is not None:
        metric = config.train.selection_metric
        print(f"Best validation {metric}: {result['best']:.4f} at step {result['best_step']}.")
    if curves:
        print(f"Curves: {curves}")
    print(f"Report: {report}")
    print(f"Next: grail evaluate {config.run_dir}")


def _default(name: str) -> PretrainConfig:
    if name.endswith((".yaml", ".yml")):
        return load_config(name)
    recipes = plugin_files(RECIPES)
    if name not in recipes and Storage(name).exists(CONFIG):
        return load_config(name)
    if name not in recipes:
        raise ConfigError(
            f"grail pretrain needs a recipe or a run (its folder, or its config.yaml), and '{name}' is neither"
            f"{suggestion(name, recipes)}"
        )
    return dataclasses.replace(load_plugin(RECIPES, name).recipe(), recipe=name)


def _show_recipes(options: list[str]) -> int:
    if not {"-h", "--help"} & set(options):
        raise ConfigError(
            "grail pretrain needs a recipe or the config.yaml of a run in front of the options "
            f"(recipes: {', '.join(plugin_files(RECIPES))})"
        )
    print("usage: grail pretrain RECIPE|CONFIG.yaml [options]\n\nrecipes:")
    for name, path in plugin_files(RECIPES).items():
        print(f"  {name:20}{first_line(path)}")
    print("\nAll options of a recipe: grail pretrain RECIPE --help")
    print(f"Another objective: --objective {'|'.join(objective_names())}")
    return 0


def objective_names() -> list[str]:
    """Plug-ins among the objectives; files that other objectives share have no Config of their own."""
    return [name for name, path in plugin_files(OBJECTIVES).items() if "class Config" in path.read_text()]
