"""A typed configuration as plain YAML and back; reading it runs no code but imports of the project's "
"packages."""

import dataclasses
import importlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

import yaml

from cluster.errors import ConfigError
from cluster.packages import PACKAGES
from cluster.plugins import suggestion

TYPE = "type"


def to_document(config: Any) -> dict[str, Any]:
    """Plain values of a dataclass; where a field may hold several types, the type's import path goes along."""
    hints = typing.get_type_hints(type(config))
    document = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if _is_open(hints[entry.name]) and dataclasses.is_dataclass(value):
            document[entry.name] = {TYPE: _type_name(type(value)), **to_document(value)}
        else:
            document[entry.name] = _plain(value)
    return document


def from_document(form: type, document: Mapping[str, Any], path: str = "") -> Any:
    """Build a dataclass of type `form` from plain values.

    Raises: ConfigError naming the option that is unknown, or whose value does not fit.
    """
    if not isinstance(document, Mapping):
        raise ConfigError(f"{path or 'the configuration'} must be a section of options, got {document!r}")
    hints = typing.get_type_hints(form)
    names = {entry.name for entry in dataclasses.fields(form)}
    for name in document:
        if name not in names:
            raise ConfigError(f"there is no option {_join(path, name)}{suggestion(str(name), names)}")
    missing = sorted(
        entry.name
        for entry in dataclasses.fields(form)
        if entry.name not in document
        and entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
    )
    if missing:
        raise ConfigError(
            f"{path or 'the configuration'} must have the options {', '.join(missing)}; add them"
        )
    return form(**{name: _value(hints[name], value, _join(path, name)) for name, value in document.items()})


def from_file(form: type, document: Mapping[str, Any], source: str) -> Any:
    """`from_document`, for what lies in a file. Raises: ConfigError that names the file too."""
    try:
        return from_document(form, document)
    except ConfigError as error:
        raise ConfigError(
            f"{source}: {error}; where another version of grail wrote the file, take such lines out or rename them"
        ) from error


def to_yaml(document: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)


def from_yaml(text: str, source: str) -> dict[str, Any]:
    """Raises: ConfigError if the text is not YAML of plain values."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} must be YAML of plain values, and is not: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{source} must hold the options of a run, and holds {type(document).__name__}")
    return document


def _is_open(hint: Any) -> bool:
    """Whether a field's type does not say which configuration it holds."""
    return hint is Any or sum(map(dataclasses.is_dataclass, typing.get_args(hint))) > 1


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _type_name(form: type) -> str:
    return f"{form.__module__}.{form.__qualname__}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_document(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return value


def _value(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _any(value, path)
    if _is_open(hint):
        found = _any(value, path)
        names = ", ".join(_type_name(form) for form in arguments if form is not type(None))
        _require(isinstance(found, arguments), path, f"a section of type {names}", value)
        return found
    if dataclasses.is_dataclass(hint):
        return from_document(hint, value, path)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _value(hint, value, path)
    if origin is Literal:
        _require(value in arguments, path, f"one of {', '.join(map(str, arguments))}", value)
        return value
    if origin is tuple:
        _require(isinstance(value, list), path, "a list", value)
        return tuple(_value(arguments[0], entry, path) for entry in value)
    if origin is not None and issubclass(origin, Mapping):
        _require(isinstance(value, Mapping), path, "a section", value)
        return {name: _value(arguments[1], entry, _join(path, name)) for name, entry in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _require(type(value) is hint, path, f"of type {hint.__name__}", value)
    return value


def _any(value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    name = value.get(TYPE)
    _require(isinstance(name, str), path, f"a section with the name of its {TYPE}", value)
    rest = {key: entry for key, entry in value.items() if key != TYPE}
    return from_document(_find_type(name, path), rest, path)


def _find_type(name: str, path: str) -> type:
    """The dataclass of this import path, such as models.sasrec.SASRec.Config."""
    parts = name.split(".")
    found: Any = None
    if parts[0] in PACKAGES:
        for cut in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:cut])
            try:
                found = importlib.import_module(module)
            except ModuleNotFoundError:
                continue
            for part in parts[cut:]:
                found = getattr(found, part, None)
            break
    # An import into another module does not make a type its own, so nothing foreign can be reached.
    if not (isinstance(found, type) and dataclasses.is_dataclass(found) and _type_name(found) == name):
        raise ConfigError(
            f"{path}.type must name a configuration of {', '.join(PACKAGES)}, such as "
            f"models.sasrec.SASRec.Config, got {name}"
        )
    return found


def _require(holds: bool, path: str, wanted: str, value: Any) -> None:
    if not holds:
        raise ConfigError(f"{path} must be {wanted}, got {value!r}")
