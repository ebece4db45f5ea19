"""What a run that goes on was given, against what it has been trained with so far."""

from collections.abc import Mapping
from typing import Any

from cluster.errors import ConfigError

_LEARNING = ("data", "model", "objective", "train", "align")
"""Sections that say what a run learns, and from what."""
_MAY_CHANGE = {
    "align.stop_on",
    "data.prefetch_steps",
    "train.activation_checkpointing",
    "train.audit",
    "train.checkpoint_every_s",
    "train.checkpoint_every_steps",
    "train.compile",
    "train.epochs",
    "train.keep_last",
    "train.max_steps",
    "train.micro_batches",
    "train.patience",
    "train.precision",
    "train.selection_metric",
    "train.validate_every_epochs",
    "train.validate_every_steps",
    "train.zero_stage",
}
"""What does not change what a step learns."""


def changed_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Settings of learning that differ between two configurations as plain values, such as: train.learning-rate
    0.001 -> 0.002. Those that only one of them knows are passed over: versions have other ones.

    Raises: ConfigError where the seeds differ, which makes them two runs.
    """
    seeds = saved.get("seed"), current.get("seed")
    if None not in seeds and seeds[0] != seeds[1]:
        raise ConfigError(
            f"a run that goes on must keep its seed, which is {seeds[0]}, and {seeds[1]} was given; name another "
            "--run-dir to begin another run"
        )
    both = [name for name in _LEARNING if name in saved and name in current]
    return [line for name in both for line in _changes(saved[name], current[name], name)]


def _changes(saved: Any, current: Any, name: str) -> list[str]:
    if isinstance(saved, dict) and isinstance(current, dict):
        both = [key for key in current if key in saved and f"{name}.{key}" not in _MAY_CHANGE]
        return [line for key in both for line in _changes(saved[key], current[key], f"{name}.{key}")]
    return [] if saved == current else [f"{name.replace('_', '-')} {saved} -> {current}"]
