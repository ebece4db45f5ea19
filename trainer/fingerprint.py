"""Whether a checkpoint belongs to the model at hand."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any

from cluster.errors import CheckpointError

_MOST_LISTED = 20
_ABSENT = "absent"
_KIND = "model.model.type: "


def model_fingerprint(shapes: Mapping[str, Sequence[int]], model: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two models the same: the global shape of every tensor and the resolved model config."""
    fingerprint = {"shapes": {name: list(shape) for name, shape in shapes.items()}, "model": model}
    return json.loads(json.dumps(fingerprint))


def compare_fingerprint(
    saved: Mapping[str, Any], current: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """Check that a checkpoint fits the model. An option that the checkpoint is too old to know had its default.

    Raises: CheckpointError listing every field that differs, saved against current.
    """
    saved, current, defaults = (json.loads(json.dumps(part)) for part in (saved, current, defaults or {}))
    differences = _differences(_filled_up(saved, {"model": defaults}), current, "")
    if not differences:
        return
    # Of another kind of model all differs, and its kind says it all.
    kinds = [line for line in differences if line.startswith(_KIND)]
    listed = kinds or differences[:_MOST_LISTED]
    if kinds:
        listed.append("and more that follows from it")
    elif len(differences) > len(listed):
        listed.append(f"and {len(differences) - len(listed)} more")
    raise CheckpointError(
        "the checkpoint must belong to the same model, but these differ:\n  "
        + "\n  ".join(listed)
        + "\nGive the model options of the checkpoint, use another run directory, or take the weights only "
        "with --init-from. Workers, sharding, ZeRO stage and the length of the run may change on resume."
    )


def option_defaults(part: Any) -> dict[str, Any]:
    """What the options of a configuration are where nothing is said of them, by name; those of its parts too."""
    found = {}
    for option in fields(part) if is_dataclass(part) else ():
        value, default = getattr(part, option.name), option.default
        if default is MISSING and option.default_factory is not MISSING:
            default = option.default_factory()
        if is_dataclass(value):
            found[option.name] = option_defaults(value)
        elif default is not MISSING:
            found[option.name] = _plain(default)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return asdict(value) if is_dataclass(value) else value


def _filled_up(saved: Any, defaults: Any) -> Any:
    """With the options that are not there."""
    if not (isinstance(saved, dict) and isinstance(defaults, dict)):
        return saved
    return {**defaults, **{key: _filled_up(value, defaults.get(key)) for key, value in saved.items()}}


def _differences(saved: Any, current: Any, path: str) -> list[str]:
    if isinstance(saved, dict) and isinstance(current, dict):
        return [
            line
            for key in sorted(saved.keys() | current.keys())
            for line in _differences(
                saved.get(key, _ABSENT), current.get(key, _ABSENT), f"{path}.{key}" if path else key
            )
        ]
    return [] if saved == current else [f"{path}: {saved} saved, {current} now"]
