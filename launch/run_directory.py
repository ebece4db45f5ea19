"""What lies where in a run directory, and what may happen to one that is not empty.

config.yaml        the resolved configuration; `grail pretrain config.yaml` runs it again
plan.txt           how the tables were sharded
align.yaml         of an alignment: its configuration; `grail align align.yaml` runs it again
alignment.json     of an alignment: the start, the last and the best step on held-out items
alignment.png      of an alignment: reward, held-out metric, illegal completions, entropy, where the time went
metrics.jsonl      a line of numbers every few steps
curves.png         pictures of them
experts.png        how evenly the experts are used, where the model has any
logs/rank-N.log    everything each worker said
audit/             the users each step's loss saw
checkpoints/       steps, LATEST and BEST
evaluation.json    the last evaluation
report.html        all of this on one page
status.json        how the run is doing, for `grail status`
faults.json        the faults it was started again after
lease.json         there while a job works on the run
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, ConfigError, DataError, GrailError
from cluster.reporter import Event
from cluster.storage import Storage
from launch.config_document import from_file, from_yaml, to_document, to_yaml
from trainer.configuration import CHECKPOINTS, PretrainConfig, SearchConfig

CONFIG = "config.yaml"
EVALUATION = "evaluation.json"
CURVES = "curves.png"
ALIGN = "align.yaml"
ALIGNMENT = "alignment.json"
ALIGNMENT_CURVES = "alignment.png"
EXPERTS = "experts.png"
REPORT = "report.html"
SEARCH_SCALING = "search_scaling.json"
SCALING_PICTURE = "search_scaling.png"
LOGS = "logs"


def prepare(config: PretrainConfig) -> dict[str, Any]:
    """Make the run directory ready for a start and return the document of its config.yaml.

    A directory with checkpoints keeps the config.yaml it has until the run goes on: what was given may not fit them.

    Raises: ConfigError if `--resume never` meets a checkpoint.
    """
    storage, document = Storage(config.run_dir), to_document(config)
    goes_on = has_checkpoint(config.run_dir)
    if goes_on and config.resume == "never":
        raise ConfigError(
            f"--resume never needs a run directory without checkpoints, and {config.run_dir} has some; name "
            "another --run-dir, or leave --resume out to go on from the latest one"
        )
    storage.make_directory()
    if not (goes_on and storage.exists(CONFIG)):
        write_document(config.run_dir, CONFIG, document)
    return document


def require_own_folder(run_dir: str, *, alignment: bool) -> None:
    """Raises: ConfigError where the run directory is a file, or holds a data set or a run of the other kind, of
    pretraining or alignment, which this one would go on with or replace."""
    from data_streams.manifest import MANIFEST_NAME

    for place in (Path(run_dir), *Path(run_dir).parents):
        if place.is_file():
            raise ConfigError(f"run-dir must be a folder, and {place} is a file; name another one")
    if Storage(run_dir).exists(MANIFEST_NAME):
        raise ConfigError(
            f"run-dir must be a folder of its own, and {run_dir} holds a data set; name another one, such as "
            f"{run_dir.rstrip('/')}-run"
        )
    is_alignment = Storage(run_dir).exists(ALIGN)
    if is_alignment and not alignment:
        raise ConfigError(
            f"run-dir must be a folder without an alignment, and {run_dir} holds one; go on with it by `grail align "
            f"{run_dir}/{ALIGN}`, or name another --run-dir (with --init-from {run_dir} to take its weights)"
        )
    if alignment and not is_alignment and has_checkpoint(run_dir):
        raise ConfigError(
            f"run-dir must be a new folder or that of an alignment, and {run_dir} holds a pretraining; name another one"
        )


def read_json(run_dir: Storage, name: str) -> dict[str, Any]:
    """The content of a file of a run or a sweep; empty where there is none. Raises: DataError for a damaged one."""
    if not run_dir.exists(name):
        return {}
    try:
        return json.loads(run_dir.read(name))
    except ValueError as error:
        raise DataError(
            f"{run_dir.path(name)} must be JSON as grail wrote it, and is damaged: {error}; remove it, and give the "
            "command that makes it again"
        ) from error


def write_document(run_dir: str, name: str, document: dict[str, Any]) -> None:
    Storage(run_dir).write(name, to_yaml(document).encode())


class KeptDocuments:
    """Writes configurations once the run is known to fit them, and goes on; starts of its workers after that do not
    touch them."""

    def __init__(self, run_dir: str, documents: Mapping[str, dict[str, Any]]):
        self._run_dir, self._documents = run_dir, dict(documents)

    def on_event(self, event: Event) -> None:
        if event.kind == "begun":
            while self._documents:
                write_document(self._run_dir, *self._documents.popitem())


def way_on(run_dir: str, name: str, document: dict[str, Any]) -> str:
    """How a stopped run goes on, such as: grail pretrain RUN_DIR/config.yaml."""
    storage, again = Storage(run_dir), "Go on with the same command again."
    try:
        is_same = from_yaml(storage.read(name).decode(), storage.path(name)) == document
    except (GrailError, OSError):
        # Not there, edited just now, or out of reach: a run that was stopped in order says so all the same.
        return again
    return (
        f"Go on with: grail {'align' if name == ALIGN else 'pretrain'} {run_dir}/{name}" if is_same else again
    )


def load_config(path: str) -> PretrainConfig:
    """The configuration of a run directory, or of a YAML file such as one's config.yaml.

    Raises: CheckpointError if there is no run; ConfigError if its configuration cannot be used.
    """
    is_file = path.endswith((".yaml", ".yml"))
    folder, name = folder_and_name(path) if is_file else (path, CONFIG)
    storage = Storage(folder)
    if not storage.exists(name):
        raise CheckpointError(
            f"{path} must be {'a file' if is_file else f'a run directory with a {CONFIG}'}, and there is "
            "none; look at the path, or start a run with `grail pretrain`"
        )
    document = from_yaml(storage.read(name).decode(), storage.path(name))
    if "rewards" in document:
        raise ConfigError(
            f"{path} is the configuration of an alignment; go on with it by `grail align {path}`"
        )
    config = from_file(PretrainConfig, document, storage.path(name))
    return config if is_file else dataclasses.replace(config, run_dir=absolute(path))


def has_checkpoint(run_dir: str) -> bool:
    """Whether any step lies among the checkpoints, complete or not."""
    return any(name.startswith("step-") for name in Storage(f"{run_dir}/{CHECKPOINTS}").list())


def parse_checkpoint(text: str) -> str | int:
    """latest, best or a step number, as the option --checkpoint takes it."""
    if text in ("latest", "best"):
        return text
    if not re.fullmatch(r"\d+", text):
        raise ConfigError(f"--checkpoint must be latest, best or the number of a step, got '{text}'")
    return int(text)


def folder_and_name(path: str) -> tuple[str, str]:
    """Where a file lies and what it is called; a pathlib.Path would take a slash out of an address.

    Example: "s3://bucket/run/config.yaml" -> ("s3://bucket/run/", "config.yaml").
    """
    name = path.rpartition("/")[2]
    return path.removesuffix(name) or ".", name


def local_file(path: str, option: str) -> str:
    """A path from the root on, for what is written to a disk and not to an address.

    Raises: ConfigError for an address.
    """
    if "://" in path:
        raise ConfigError(f"{option} must be a path on a disk, got {path}; write it there and copy it")
    return absolute(path)


def require_ending(path: str, ending: str, option: str) -> None:
    """Raises: ConfigError where a file is not named as what is written into it."""
    if not path.endswith(ending):
        raise ConfigError(f"{option} must end in {ending}, as that is what is written; got {path}")


def absolute_search(config: SearchConfig) -> SearchConfig:
    """The same search with its files of items and the run of its PRM named from the root on."""
    named = {name: absolute(getattr(config, name)) for name in ("allow", "deny", "prm_run")}
    return dataclasses.replace(config, **named)


def absolute(path: str) -> str:
    """A local path from the root on, since workers may stand in another folder; an address without a slash at its end,
    behind which an object store would look for other files."""
    if "://" in path:
        return path.rstrip("/")
    return path and str(Path(path).expanduser().absolute())
