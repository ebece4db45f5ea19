"""Train a recipe at many sizes, settings and seeds, and compare: grail sweep RECIPE --over OPTION=A,B [options]"""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath

import tyro

from cluster.errors import ConfigError
from cluster.reporter import StopSignal
from cluster.storage import Storage
from launch.commands.pretrain import STOPPED, parse_config
from launch.options import split_name
from launch.progress import start_console
from launch.run_directory import CONFIG, absolute, has_checkpoint, require_own_folder
from launch.sweep_plan import SweptRun, plan_runs
from trainer.checks import check


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Train a recipe at many sizes, settings and seeds, and compare. All other options are those of `grail pretrain`
    and hold for all runs."""

    out: str = ""
    """Folder or address of the runs, results.csv, picture.png and report.html; left out, runs/RECIPE-sweep."""
    points: tuple[str, ...] = ()
    """Settings that go together, in quotes: "model.width=64 model.num-blocks=2" is one point. Each is trained."""
    over: tuple[str, ...] = ()
    """An option with values, as in train.learning-rate=1e-3,2e-3; several options, and points, are all combined."""
    seeds: tuple[int, ...] = (0,)
    """Seeds that each combination is trained with."""
    at_once: int = 1
    """Runs that are trained at the same time, each with the workers it asks for."""
    evaluate: bool = False
    """Rank the test items with the best checkpoint of each run too (`grail evaluate`)."""
    against: str = ""
    """What the picture is drawn against: parameters (outside of tables), blocks (those of the blocks), targets
    (supervised events seen), flops (operations of the training) or an option of the sweep; left out, parameters, or
    the first option where they are all equal."""
    metric: str = "loss"
    """What is drawn: loss, or any other column of results.csv. A law is fitted to losses of four sizes or more; one of
    model and data at once where six runs or more have three sizes and three amounts of data."""
    last_part: float = 0.2
    """Share of the steps at the end whose mean loss counts: in a single epoch, of events not trained on before."""


def run(arguments: list[str]) -> int:
    recipe, rest = split_name(arguments)
    program = f"grail sweep {recipe or 'RECIPE'}"
    if {"-h", "--help"} & set(rest):
        tyro.cli(SweepOptions, args=["--help"], prog=program)
    if recipe is None:
        raise ConfigError(
            "grail sweep needs a recipe in front of the options; all options: grail sweep --help"
        )
    _require_once(rest)
    options, common = tyro.cli(SweepOptions, args=rest, prog=program, return_unknown_args=True)
    return sweep(recipe, options, common)


def _require_once(arguments: Sequence[str]) -> None:
    """Raises: ConfigError for a list that is given again, which would take the place of the first."""
    given = Counter(word.partition("=")[0] for word in arguments)
    if twice := [name for name in ("--points", "--over", "--seeds") if given[name] > 1]:
        raise ConfigError(
            f"{twice[0]} must be given once, with all its values behind it (as in --over a=1,2 b=3,4), and is "
            f"given {given[twice[0]]} times"
        )


def sweep(recipe: str, options: SweepOptions, common: Sequence[str]) -> int:
    """Train what is not finished and show all; the exit code: 0 when done, 1 where runs failed, 75 when stopped.

    Raises: ConfigError before any run is started, for options that fit no run, or that others were trained with.
    """
    from rich.console import Console

    from launch.sweep_report import write_results
    from launch.sweep_runs import SweepRunner

    if options.at_once < 1 or not options.seeds or not 0 < options.last_part <= 1:
        raise ConfigError(
            "--at-once must be at least 1, --seeds one or more and --last-part above 0 and at most 1, got "
            f"{options.at_once}, {options.seeds} and {options.last_part}"
        )
    out = absolute(options.out or f"runs/{PurePath(recipe).stem}-sweep").rstrip("/")
    runs = plan_runs(options.points, options.over, options.seeds, common)
    _check(recipe, runs, options.against)
    _keep(out, recipe, runs, options)
    commands = {name: [recipe, *run.words] for name, run in runs.items()}
    runner = SweepRunner(out, commands, at_once=options.at_once, evaluate=options.evaluate)
    stop = StopSignal()
    with stop.on_signals():
        is_whole = runner.run(start_console(), stop)
    write_results(out, Console())
    if not is_whole:
        print("Stopped. Go on with the same command again.", file=sys.stderr)
        return STOPPED
    if runner.failed:
        print(f"{len(runner.failed)} of {len(runs)} runs failed: {', '.join(runner.failed)}", file=sys.stderr)
    return int(bool(runner.failed))


def _check(recipe: str, runs: Mapping[str, SweptRun], against: str) -> None:
    """Raises: ConfigError for what would end a run at its start, or could not be drawn."""
    from data_streams.stream import open_data
    from launch.sweep_picture import FLOPS, SIZES

    configs = [parse_config(recipe, run.words) for run in runs.values()]
    for config in configs:
        check(config)
    for data in {config.data for config in configs}:
        open_data(data)
    names = dict.fromkeys([*SIZES, *(name for run in runs.values() for name in run.settings)])
    if against and against not in names:
        raise ConfigError(f"--against must be one of {', '.join(names)}, got {against}")
    if against == FLOPS and any(config.train.compile for config in configs):
        raise ConfigError(
            "--against flops draws against operations, which are not counted with train.compile; leave either out"
        )


def _keep(out: str, recipe: str, runs: Mapping[str, SweptRun], options: SweepOptions) -> None:
    """Write down what the runs are asked for, beside those that the sweep has already, and how they are to be shown.

    Raises: ConfigError where a run of the same name is there that was asked for otherwise.
    """
    from launch.sweep_results import SWEEP, read_sweep

    require_own_folder(out, alignment=False)
    if Storage(out).exists(CONFIG):
        raise ConfigError(f"--out must be a folder of its own, and {out} holds a run; name another one")
    known = read_sweep(out).get("runs", {})
    for name, run in runs.items():
        asked = {"recipe": recipe, **asdict(run)}
        if known.get(name, asked) != asked or (name not in known and has_checkpoint(f"{out}/{name}")):
            raise ConfigError(
                f"--out must be a new folder or that of the same sweep, and {out} holds a run {name} that was asked "
                f"for with other options: {' '.join(known.get(name, {}).get('words', ()))}; name another --out"
            )
        known[name] = asked
    shown = {name: getattr(options, name) for name in ("against", "metric", "last_part")}
    Storage(out).make_directory()
    Storage(out).write(SWEEP, json.dumps({**shown, "runs": known}, indent=1).encode())
