"""What the runs of a sweep have reached, a row of numbers for each."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from cluster.errors import CheckpointError
from cluster.storage import Storage
from launch.run_directory import EVALUATION, read_json
from launch.run_status import report_run
from launch.sweep_picture import FLOPS, LOSS, TARGETS, Row
from trainer.checkpoint_reader import CheckpointReader
from trainer.configuration import CHECKPOINTS
from trainer.metric_log import read_metrics
from trainer.plain_engine import MOMENTS

SWEEP = "sweep.json"
GIGAFLOPS = "train/gigaflops_per_target"
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
    seen = np.diff(steps) * [line["train/targets_per_step"] for line in lines]
    # Not counted where the model is compiled.
    operations = [1e9 * line[GIGAFLOPS] for line in lines if GIGAFLOPS in line]
    return {
        "step": progress["step"],
        TARGETS: round(seen.sum()),
        FLOPS: float(seen @ operations) if len(operations) == len(seen) > 0 else None,
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
