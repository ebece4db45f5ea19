"""What the runs of a sweep have reached: a table, a picture, the law that losses follow, and one page with all."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from cluster.errors import CheckpointError, ConfigError
from cluster.storage import Storage
from launch.report_page import Section, render_page
from launch.run_directory import EVALUATION, REPORT, read_json
from launch.run_status import report_run
from launch.scaling_law import LEAST_SIZES, ScalingLaw, fit_law
from launch.sweep_picture import SIZES, Row, draw_sweep
from launch.sweep_plan import short_names
from trainer.checkpoint_reader import CheckpointReader
from trainer.configuration import CHECKPOINTS
from trainer.metric_log import read_metrics
from trainer.plain_engine import MOMENTS

SWEEP, RESULTS, PICTURE, LAW = "sweep.json", "results.csv", "picture.png", "law.json"
LOSS = "loss"
_SWITCHED = "yes"


def read_sweep(out: str) -> dict[str, Any]:
    """What `grail sweep` wrote down: the runs by name, with settings, seed and words, and how they are shown; empty
    where there is no sweep."""
    return read_json(Storage(out), SWEEP)


def collect(out: str, runs: Mapping[str, Any], *, last_part: float) -> list[Row]:
    """A row for each run that has taken a checkpoint."""
    rows, options = [], swept_options(runs)
    for name, run in runs.items():
        try:
            reader = CheckpointReader(Storage(f"{out}/{name}/{CHECKPOINTS}"))
        except CheckpointError:
            continue  # not begun yet
        rows.append(
            {
                "run": name,
                **{option: _setting(run["settings"], option) for option in options},
                "seed": run["seed"],
                "state": report_run(f"{out}/{name}").state,
                **_sizes(reader),
                **_learnt(f"{out}/{name}", reader, last_part),
                **_evaluated(f"{out}/{name}"),
            }
        )
    return rows


def swept_options(runs: Mapping[str, Any]) -> list[str]:
    """All that any of the runs was given of its own."""
    return list(dict.fromkeys(name for run in runs.values() for name in run["settings"]))


def _setting(settings: Mapping[str, str], option: str) -> str:
    """Nothing where a run was not given the option; a switch, which has no value, must not look alike."""
    return (settings[option] or _SWITCHED) if option in settings else ""


def _sizes(reader: CheckpointReader) -> Row:
    # Frozen weights and the biases of experts are kept among them too, but no optimizer has moments of those.
    shapes = reader.shared_state["dense_shapes"].items()
    counts = {name: prod(shape) for name, shape in shapes if f"{MOMENTS[0]}/{name}" in reader.tensors}
    tables = [shape for name, (shape, _) in reader.tensors.items() if name.startswith("table/")]
    return {
        "parameters": sum(counts.values()),
        "blocks": sum(count for name, count in counts.items() if "blocks" in name.split(".")),
        "table_parameters": sum(map(prod, tables)),
    }


def _learnt(run_dir: str, reader: CheckpointReader, last_part: float) -> Row:
    lines = [line for line in read_metrics(run_dir) if "train/loss" in line]
    steps = [0, *(line["step"] for line in lines)]
    progress = reader.shared_state["progress"]
    config = reader.shared_state["config"]
    return {
        "step": progress["step"],
        "targets": round(
            sum(
                line["train/targets_per_step"] * taken
                for line, taken in zip(lines, np.diff(steps), strict=True)
            )
        ),
        "targets_per_s": float(np.median([line["train/targets_per_s"] for line in lines])) if lines else None,
        LOSS: mean_of_last([line["train/loss"] for line in lines], steps, last_part) if lines else None,
        f"valid/{config['train']['selection_metric']}": progress["best"],
    }


def mean_of_last(losses: Sequence[float], steps: Sequence[int], last_part: float) -> float:
    """The mean over the last part of the steps: in a single epoch, of events not trained on before.

    Each loss is that of the steps from one of `steps` to the next; a line on the border counts with its share.
    """
    begin = min((1 - last_part) * steps[-1], steps[-1] - 1)
    return float(np.average(losses, weights=np.diff(np.maximum(steps, begin))))


def _evaluated(run_dir: str) -> Row:
    content = read_json(Storage(run_dir), EVALUATION)
    return {f"{content['split']}/{name}": value for name, value in content.get("metrics", {}).items()}


def write_results(out: str, console: Console) -> None:
    """Write table, picture, law and page of a sweep, and print the table, the law and where they lie.

    Raises: ConfigError where no run has such a number; the table is there all the same.
    """
    storage, sweep = Storage(out), read_sweep(out)
    runs, metric = sweep["runs"], sweep["metric"]
    rows = collect(out, runs, last_part=sweep["last_part"])
    storage.write(RESULTS, pl.DataFrame(rows, infer_schema_length=None).write_csv().encode())
    if rows and metric not in (columns := _columns_of_numbers(rows)):
        raise ConfigError(
            f"--metric must be a column of numbers in {RESULTS} ({', '.join(columns)}), got {metric}"
        )
    options = swept_options(runs)
    against = sweep["against"] or _varied(rows, options)
    # What a run was on its way to is no loss of its size.
    ended = [row for row in rows if row["state"] == "finished"]
    points = [row for row in ended if row.get(metric) is not None and row.get(against) is not None]
    law = _law(points, against) if metric == LOSS else None
    if law is not None:
        storage.write(LAW, json.dumps({"against": against, **vars(law)}, indent=1).encode())
    picture = draw_sweep(points, options, against, metric, law) if points else None
    if picture:
        storage.write(PICTURE, picture)
    storage.write(REPORT, _page(out, rows, picture, law))
    if rows:
        console.print(_table(rows, options, metric))
    if law is not None:
        console.print(f"{law}, N: {SIZES[against]}")
    console.print(f"Written to {storage.path(RESULTS)} and {storage.path(REPORT)}", soft_wrap=True)


def _columns(rows: Sequence[Row]) -> list[str]:
    """Those of any row: not all runs have been evaluated."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _columns_of_numbers(rows: Sequence[Row]) -> list[str]:
    return [name for name in _columns(rows) if not any(isinstance(row.get(name), str) for row in rows)]


def _varied(rows: Sequence[Row], options: Sequence[str]) -> str:
    """The number of parameters, unless all runs have the same and there is an option they differ in."""
    is_fixed = len({row["parameters"] for row in rows}) < 2
    return options[0] if is_fixed and options else "parameters"


def _law(rows: Sequence[Row], against: str) -> ScalingLaw | None:
    """Of the settings with equal size the best one counts, each as the mean over its seeds."""
    if against not in SIZES:
        return None
    of_seeds, best = defaultdict(list), {}
    for row in rows:
        of_seeds[row[against], row["run"].rpartition("_seed-")[0]].append(row[LOSS])
    for (size, _), values in of_seeds.items():
        best[size] = min(best.get(size, np.inf), float(np.mean(values)))
    return fit_law([*best], [*best.values()]) if len(best) >= LEAST_SIZES else None


def _table(rows: Sequence[Row], options: Sequence[str], metric: str) -> Table:
    """The options that runs differ in, and the columns that are looked at first."""
    options = [name for name in options if len({row.get(name) for row in rows}) > 1]
    validated = [name for name in _columns(rows) if name.startswith("valid/")]
    names = dict.fromkeys(["seed", "state", "step", "parameters", LOSS, *validated, metric])
    table, short = Table(), short_names(options)
    table.add_column("settings", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        settings = (f"{short[name]}={row[name]}" for name in options if row[name])
        table.add_row(" ".join(settings), *(_shown(row.get(name)) for name in names))
    return table


def _page(out: str, rows: Sequence[Row], picture: bytes | None, law: ScalingLaw | None) -> bytes:
    names = _columns(rows)
    shown = [[_shown(row.get(name)) for name in names] for row in rows]
    return render_page(
        f"{PurePosixPath(out).name}: a sweep",
        [
            Section(title="Picture", note=str(law or ""), pictures=[picture] if picture else []),
            Section(title="Runs", headers=names, rows=shown),
            Section(title="How it was asked for", text=Storage(out).read(SWEEP).decode()),
        ],
    )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}" if value < 1000 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
