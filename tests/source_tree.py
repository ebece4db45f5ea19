"""The project's Python files as syntax trees, for the tests that read source code."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LAYERS = ("launch", "rl", "trainer", "sharding", "models", "data_streams", "cluster")
"""Each package may import itself and those to its right."""


@cache
def sources(*packages: str) -> dict[str, ast.Module]:
    """Path below the root -> syntax tree, of every file in these packages."""
    files = sorted(file for package in packages for file in (ROOT / package).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(), str(file)) for file in files}


def imports(tree: ast.AST, path: str) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of every import, also those inside functions; `from a import b` gives `a.b`."""
    package = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def is_within(module: str, *parents: str) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def dotted_name(node: ast.AST) -> str:
    """`a.b.c` of a name or a chain of attributes; the called name of a call."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{dotted_name(value)}.{name}"
        case ast.Call(func=function):
            return dotted_name(function)
    return ""
