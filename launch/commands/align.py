"""Improve a pretrained policy by rewards (GRPO-SR and others): grail align RUN_DIR|ALIGN.yaml [options]"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cluster.errors import CheckpointError, ClusterError, ConfigError
from cluster.plugins import first_line, plugin_config, plugin_files
from cluster.reporter import Event, StopSignal, to_all
from cluster.storage import Storage
from launch.config_document import from_file, from_yaml, to_document
from launch.options import parse, require_name, split_name, take_option
from launch.progress import TrainingProgress, start_console
from launch.reward_parts import REWARDS, located, reward_setting, reward_term, terms_form, terms_of
from launch.run_directory import (
    ALIGN,
    ALIGNMENT,
    CHECKPOINTS,
    CONFIG,
    KeptDocuments,
    absolute,
    absolute_search,
    folder_and_name,
    has_checkpoint,
    load_config,
    prepare,
    require_own_folder,
    way_on,
    write_document,
)
from launch.served_run import find_step

if TYPE_CHECKING:
    from rl.configuration import AlignConfig
    from trainer.configuration import PretrainConfig

OBJECTIVES, ADVANTAGES = "rl.objectives", "rl.advantages"
STOPPED = 75


def run(arguments: list[str]) -> int:
    name, options = split_name(arguments)
    if name is None and {"-h", "--help"} & set(options):
        print(_usage())
        return 0
    if name is None:
        raise ConfigError(
            f"grail align needs the directory of a pretrained run, or the {ALIGN} of an alignment, in front of the "
            "options; all options: grail align RUN_DIR --help"
        )
    return align(parse_config(name, options))


def _usage() -> str:
    lines = [f"usage: grail align RUN_DIR|{ALIGN} [options]\n"]
    for option, package in (("objective", OBJECTIVES), ("advantage", ADVANTAGES), ("rewards", REWARDS)):
        lines += [f"--{option}, one of{' these, or several with commas' if option == 'rewards' else ''}:"]
        lines += [f"  {name:18}{first_line(path)}" for name, path in plugin_files(package).items()]
    return "\n".join([*lines, "\nAll options: grail align RUN_DIR --help"])


def parse_config(name: str, options: list[str]) -> "AlignConfig":
    """The configuration of an alignment of a run, or of a YAML file, overridden by the options.

    Raises: ConfigError if the options cannot work together; CheckpointError if there is no such run.
    """
    from rl.configuration import AlignConfig

    default = _saved(name) if name.endswith((".yaml", ".yml")) else _default(name)
    chosen, options = _plug_ins(options)
    default = dataclasses.replace(default, **chosen)
    form = dataclasses.make_dataclass(
        "AlignForm",
        [
            (entry.name, Any if entry.name == "rewards" else entry.type, dataclasses.field())
            for entry in dataclasses.fields(AlignConfig)
        ],
        frozen=True,
        kw_only=True,
    )
    values = {entry.name: getattr(default, entry.name) for entry in dataclasses.fields(AlignConfig)}
    shown = form(**{**values, "rewards": terms_form(default.rewards)})
    filled = parse(form, options, program=f"grail align {name}", default=shown)
    values = {entry.name: getattr(filled, entry.name) for entry in dataclasses.fields(AlignConfig)}
    config = AlignConfig(**{**values, "rewards": tuple(map(located, terms_of(filled.rewards)))})
    return dataclasses.replace(
        config,
        run_dir=absolute(config.run_dir),
        data=dataclasses.replace(
            config.data, path=absolute(config.data.path), semantic_ids=absolute(config.data.semantic_ids)
        ),
        search=absolute_search(config.search),
    )


def _default(name: str) -> "AlignConfig":
    from rl.advantages.group import GroupRelative
    from rl.configuration import AlignConfig
    from rl.objectives.grpo_sr import GrpoSr

    start = load_config(name)
    config = AlignConfig(
        start=start.run_dir,
        run_dir=f"{start.run_dir}-aligned",
        seed=start.seed,
        objective=GrpoSr.Config(),
        advantage=GroupRelative.Config(),
        rewards=(reward_term("hybrid"),),
        **{section: getattr(start, section) for section in ("data", "sharding", "evaluation", "search")},
    )
    metric = start.train.selection_metric
    return dataclasses.replace(config, train=dataclasses.replace(config.train, selection_metric=metric))


def _saved(path: str) -> "AlignConfig":
    from rl.configuration import AlignConfig

    folder, name = folder_and_name(path)
    storage = Storage(folder)
    if not storage.exists(name):
        raise CheckpointError(
            f"{path} must be the {ALIGN} of an alignment, and there is none; look at the path"
        )
    document = from_yaml(storage.read(name).decode(), path)
    if "recipe" in document:
        raise ConfigError(
            f"{path} must be the {ALIGN} of an alignment, and is the configuration of a pretraining; give the folder "
            "of that run to align it"
        )
    return from_file(AlignConfig, document, path)


def _plug_ins(options: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What is chosen by name, and the other options."""
    from rl.reward_mix import check_terms

    chosen: dict[str, Any] = {}
    for field, package in (("objective", OBJECTIVES), ("advantage", ADVANTAGES)):
        name, options = take_option(options, f"--{field}")
        if name is not None:
            require_name(field, name, plugin_files(package))
            chosen[field] = plugin_config(package, name)()
    names, options = take_option(options, "--rewards")
    if names is not None:
        chosen["rewards"] = tuple(reward_term(name) for name in names.split(","))
        check_terms(chosen["rewards"])
    return chosen, options


def align(config: "AlignConfig") -> int:
    """Run an alignment on its workers; the exit code: 0 finished, 1 ended by an alarm, 75 stopped to be resumed.

    Raises: ConfigError or DataError before any worker is started, and whatever the workers raise.
    """
    from cluster.lease import Lease
    from launch.plots import write_alignment_curves
    from launch.report import write_report
    from launch.run_status import StatusKeeper
    from rl.configuration import check_alignment
    from rl.reward_mix import prepare_terms
    from trainer.checks import check

    console, stop = start_console(), StopSignal()
    # From the beginning: to prepare rewards and to start Ray may take long.
    with stop.on_signals():
        start = load_config(config.start)
        require_own_folder(config.run_dir, alignment=True)
        check_alignment(config, start)
        setting = reward_setting(
            config.rewards,
            data_path=config.data.path,
            semantic_ids=config.data.semantic_ids,
            seed=config.seed,
        )
        # What cannot be imported or found shows here; what was computed is not computed again by the learners.
        rewarded = dataclasses.replace(config, rewards=tuple(prepare_terms(config.rewards, setting)))
        policy = config.policy(start)
        check(policy)
        start_step = find_step(start, "best")
        if not has_checkpoint(config.run_dir):
            _require_same_codes(config, start, start_step)
        keeper = StatusKeeper(config.run_dir, policy.recipe, policy.log.prometheus_file)
        with Lease(config.run_dir, stop.abort), keeper:
            own, document = to_document(config), prepare(policy)
            if not has_checkpoint(config.run_dir):
                write_document(config.run_dir, ALIGN, own)
            kept = KeptDocuments(config.run_dir, {CONFIG: document, ALIGN: own})
            learnt = {**document, "align": _learnt(own)}
            arguments = (rewarded, start, start_step, learnt, setting)
            with TrainingProgress(console) as progress:
                result = _run(config, arguments, to_all(progress, keeper, kept), stop)
            if result is not None:
                keeper.end(result["status"])
        write_alignment_curves(config.run_dir, config.train.selection_metric)
    if result is None or result["status"] == "stopped":
        at = f" at step {result['step']}" if result else ""
        print(f"Stopped{at}. {way_on(config.run_dir, ALIGN, own)}", file=sys.stderr)
        return STOPPED
    code = _report(config, result)
    print(f"Report: {write_report(config.run_dir)}")
    return code


def _run(
    config: "AlignConfig",
    arguments: tuple,
    on_event: Callable[[Event], None],
    stop: StopSignal,
) -> dict[str, Any] | None:
    """The result of the learners; None where a stop was requested before they had one."""
    from cluster.ray_start import start_ray
    from cluster.worker_group import run_gang
    from launch.jobs import align_job
    from rl.places import Places

    start_ray(config.cluster, num_cpus=math.ceil(config.num_cpus()))
    try:
        places = None if stop.requested else Places.reserve(config, stop)
    except ClusterError:
        if not stop.requested:
            raise
        places = None
    try:
        return run_gang(
            *(align_job, *arguments, places),
            config=config.cluster,
            run_dir=config.run_dir,
            on_event=on_event,
            stop=stop,
        )
    finally:
        if places is not None:
            places.remove()


def _require_same_codes(config: "AlignConfig", start: "PretrainConfig", step: int) -> None:
    """Raises: CheckpointError where the start has learnt to write other semantic IDs than those of the alignment."""
    from data_streams.semantic_ids import SemanticIdTable
    from trainer.checkpoint_reader import CheckpointReader

    saved = CheckpointReader(Storage(f"{start.run_dir}/{CHECKPOINTS}"), step).shared_state["fingerprint"]
    SemanticIdTable.load(config.data.semantic_ids).require(saved["model"]["semantic_ids"])


def _learnt(document: dict[str, Any]) -> dict[str, Any]:
    """What an alignment learns by beside the policy's configuration, with which checkpoints keep it."""
    terms = {term["name"]: term for term in document["rewards"]}
    return {
        **{name: document[name] for name in ("start", "objective", "advantage")},
        **document["align"],
        "rewards": terms,
    }


def _report(config: "AlignConfig", result: dict[str, Any]) -> int:
    """The start beside the last and the best step on held-out items, and what ended the run."""
    from rich.console import Console
    from rich.table import Table

    held_out, metric = result["notes"]["held_out"], config.train.selection_metric
    last, best = max(held_out, key=int), str(result["best_step"])
    shown = {"start": held_out["0"], f"last ({last})": held_out[last], f"best ({best})": held_out[best]}
    Storage(config.run_dir).write(ALIGNMENT, json.dumps({**result, "shown": shown}, indent=1).encode())
    table = Table(title="held-out items of the validation split")
    for name in ("metric", *shown):
        table.add_column(name, justify="left" if name == "metric" else "right")
    # A run that goes on may be given other cutoffs than its start was evaluated with.
    for name in dict.fromkeys(name for metrics in shown.values() for name in metrics):
        table.add_row(
            name, *(f"{metrics[name]:.4f}" if name in metrics else "-" for metrics in shown.values())
        )
    Console().print(table)
    if held_out[last].get(metric, math.inf) < held_out["0"].get(metric, -math.inf):
        kept = "the start itself" if result["best_step"] == 0 else f"step {best}"
        print(f"The last step is WORSE than the start in {metric}; the best one, which is kept, is {kept}.")
    if result["status"] == "halted":
        alarms = ", ".join(result["notes"]["halted_by"])
        print(f"Ended at step {result['step']} by --align.stop-on: {alarms}.", file=sys.stderr)
        return 1
    print(f"Finished at step {result['step']}. Next: grail evaluate {config.run_dir}")
    return 0
