"""Command-line options of a command: the fields of a dataclass, by tyro."""

import re
from collections.abc import Collection
from typing import Any

import tyro

from cluster.errors import ConfigError
from cluster.plugins import suggestion

RECIPES = "launch.recipes"
"""Package of the recipes, each a file."""


def parse(form: type, arguments: list[str], *, program: str, default: Any = None) -> Any:
    """Fill a dataclass from dotted options; the strings under its fields are the help.

    Lists of numbers may be written with commas: `50,100` is `50 100`. An unknown option ends the process with exit
    code 2 and the nearest valid name.
    """
    arguments = [part for argument in arguments for part in _numbers(argument)]
    if default is None:
        return tyro.cli(form, args=arguments, prog=program)
    return tyro.cli(form, args=arguments, prog=program, default=default)


def _numbers(argument: str) -> list[str]:
    return argument.split(",") if re.fullmatch(r"\d+(,\d+)+", argument) else [argument]


def split_name(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The name in front of the options, such as a recipe or a run directory, and the options."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return None, arguments


def take_option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of one option that must be known before the others are, and the rest."""
    for index, argument in enumerate(arguments):
        if argument == name and index + 1 < len(arguments):
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        if argument.startswith(f"{name}="):
            return argument.removeprefix(f"{name}="), arguments[:index] + arguments[index + 1 :]
    return None, arguments


def require_name(option: str, name: str, names: Collection[str]) -> None:
    """Raises: ConfigError where an option that chooses an objective or an advantage names none of them."""
    if name not in names:
        raise ConfigError(
            f"--{option} must be the name of an {option}, got '{name}'{suggestion(name, names)}"
        )
