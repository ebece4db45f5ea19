"""Plug-ins are files: a folder is the registry, and a file's name in kebab-case is the plug-in's name."""

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from cluster.errors import ConfigError

_LISTED = 60
"""Names that an error message lists at most."""


def plugin_files(package: str) -> dict[str, Path]:
    """Name -> file of each plug-in of a package, sorted by name; nothing is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"plug-ins are looked for in the package {package}, and there is none of that name")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.py"))
    return {path.stem.replace("_", "-"): path for path in files if not path.stem.startswith("_")}


def load_plugin(package: str, name: str) -> ModuleType:
    """Import one plug-in by its name.

    Raises: ConfigError if there is none of that name, or if its file cannot be imported.
    """
    files = plugin_files(package)
    if name not in files:
        raise ConfigError(f"{package} has no '{name}'{suggestion(name, files)}")
    try:
        return importlib.import_module(f"{package}.{files[name].stem}")
    except (ImportError, SyntaxError) as error:
        raise ConfigError(f"the plug-in '{name}' cannot be imported from {files[name]}: {error}") from error


def plugin_config(package: str, name: str) -> type:
    """The configuration class of a plug-in: the one `Config` that stands inside a class of its file.

    Raises: ConfigError if the file has none or several.
    """
    module = load_plugin(package, name)
    owners = [value for value in vars(module).values() if isinstance(value, type)]
    found = [
        vars(owner)["Config"]
        for owner in owners
        if owner.__module__ == module.__name__ and "Config" in vars(owner)
    ]
    if len(found) != 1:
        raise ConfigError(
            f"the plug-in '{name}' must have one class with a Config inside, {module.__file__} has "
            f"{len(found)}"
        )
    return found[0]


def discover(package: str) -> dict[str, ModuleType]:
    """Import every plug-in of a package: name -> module, sorted by name."""
    return {name: load_plugin(package, name) for name in plugin_files(package)}


def first_line(path: Path) -> str:
    """The first line of a file's docstring, read without importing it."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    return docstring.splitlines()[0] if docstring else ""


def suggestion(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: the nearest valid name, where one is near, and all of them, or the first of many."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    nearest = f"; did you mean '{near[0]}'?" if near else ""
    more = f" and {len(valid) - _LISTED} more" if len(valid) > _LISTED else ""
    return f"{nearest} (there are: {', '.join(valid[:_LISTED])}{more})" if valid else nearest
