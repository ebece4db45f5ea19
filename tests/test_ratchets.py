"""Limits that keep the code readable and safe; they may be tightened, never loosened."""

import ast
import re
import tomllib
from importlib import metadata
from statistics import median

import pytest
from packaging.requirements import Requirement

from tests.source_tree import LAYERS, ROOT, dotted_name, imports, is_within, sources

EVERYTHING = (*LAYERS, "tests", "benchmarks")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_MEDIAN_FUNCTION_LINES = 15
VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers"}
CODE_RUNNING_FORMATS = ("cloudpickle", "dill", "joblib", "marshal", "shelve")
UNPICKLER_PARTS = {"pickle.Unpickler", "pickle.UnpicklingError"}
"""What an allow-list reader needs of pickle; loading and dumping by pickle itself are not among it."""
LEFT_TO_SETUP = {"fbgemm-gpu", "fbgemm-gpu-cpu", "pip", "grail"}


def functions(*packages: str):
    for path, tree in sources(*packages).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_files_stay_under_400_lines():
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in sources(*EVERYTHING)}
    long = {path: length for path, length in lengths.items() if length >= MAX_FILE_LINES}
    assert not long, f"files must stay under {MAX_FILE_LINES} lines; split by subject: {long}"


def test_functions_stay_under_80_lines():
    long = [(place, length) for place, length in functions(*EVERYTHING) if length >= MAX_FUNCTION_LINES]
    assert not long, f"functions must stay under {MAX_FUNCTION_LINES} lines: {long}"


def test_the_median_function_is_short():
    middle = median(length for _, length in functions(*LAYERS))
    assert middle <= MAX_MEDIAN_FUNCTION_LINES, f"the median function has {middle} lines"


def test_files_are_named_after_a_subject():
    stems = {path: path.removesuffix(".py").rsplit("/", 1)[-1] for path in sources(*EVERYTHING)}
    vague = [path for path, stem in stems.items() if VAGUE_NAMES & set(stem.split("_"))]
    assert not vague, f"name files by what they are about: {vague}"


def test_every_test_folder_is_a_package():
    folders = {file.parent for file in (ROOT / "tests").rglob("*.py")}
    missing = [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing, f"two tests of one name collide unless their folders have an __init__.py: {missing}"


def test_nothing_loads_data_that_can_run_code():
    found = [
        f"{path}:{line} {what}"
        for path, tree in sources(*LAYERS).items()
        for line, what in unsafe_reads(tree, path)
    ]
    assert not found, "data may never be able to run code:\n" + "\n".join(found)


def unsafe_reads(tree: ast.Module, path: str):
    imported = list(imports(tree, path))
    decodes_shards = any(is_within(module, "webdataset") for module, _ in imported)
    for module, line in imported:
        if is_within(module, *CODE_RUNNING_FORMATS) or module.startswith("pickle."):
            yield line, f"imports {module}"
    for node in ast.walk(tree):
        name = dotted_name(node) if isinstance(node, ast.Attribute) else ""
        if name == "torch.load" or (name.startswith("pickle.") and name not in UNPICKLER_PARTS):
            yield node.lineno, name
        if isinstance(node, ast.Call):
            yield from unsafe_arguments(node, decodes_shards)


def unsafe_arguments(call: ast.Call, decodes_shards: bool):
    for keyword in call.keywords:
        value = getattr(keyword.value, "value", None)
        if (keyword.arg == "allow_pickle" and value is not False) or (
            keyword.arg == "weights_only" and value is not True
        ):
            yield call.lineno, f"{keyword.arg}={ast.unparse(keyword.value)}"
    is_decode = isinstance(call.func, ast.Attribute) and call.func.attr in ("decode", "autodecode")
    if decodes_shards and is_decode and [ast.unparse(argument) for argument in call.args] != ["'utf-8'"]:
        yield call.lineno, "decode() of webdataset, whose decoders unpickle (text: decode('utf-8'))"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.loads(data)",
        "from pickle import loads",
        "import cloudpickle",
        "import torch\ntorch.load(path)",
        "dcp.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=chosen)",
        "import webdataset\nwebdataset.WebDataset(urls).decode()",
        "import webdataset\nwebdataset.WebDataset(urls).decode('torch')",
    ],
)
def test_an_unsafe_read_is_recognised(code):
    assert list(unsafe_reads(ast.parse(code), "data_streams/shards.py"))


def test_an_allow_list_unpickler_and_text_pass():
    code = "import pickle, webdataset\nclass Reader(pickle.Unpickler): ...\nname.decode('utf-8')"
    assert not list(unsafe_reads(ast.parse(code), "trainer/checkpoint.py"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Package -> exact version, of both requirement files."""
    text = "\n".join((ROOT / name).read_text() for name in ("requirements.txt", "requirements-dev.txt"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "every requirement is NAME==VERSION"
    return {canonical(name): version for name, version in (line.split("==") for line in lines)}


def test_whatever_a_pinned_package_needs_is_pinned_too():
    pinned = pins()
    needs = [
        (name, Requirement(text))
        for name in pinned
        if name != "torch"  # a CUDA build asks for nvidia packages of exact versions by itself
        for text in metadata.requires(name) or []
    ]
    needed = {
        f"{canonical(need.name)} (for {name})"
        for name, need in needs
        if (need.marker is None or need.marker.evaluate({"extra": ""}))
        and canonical(need.name) not in {*pinned, *LEFT_TO_SETUP}
    }
    assert not needed, f"add these to requirements.txt: {sorted(needed)}"


def test_installed_packages_have_the_pinned_versions():
    installed = {name: metadata.version(name).split("+")[0] for name in pins()}
    assert installed == pins(), "run make setup"


def test_extras_have_the_pinned_versions():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = dict(pin.split("==") for extra in extras.values() for pin in extra)
    shared = asked.keys() & pins().keys()
    assert {"transformers", "s3fs"} <= shared, "what tests need of an extra is among the pins"
    assert {name: asked[name] for name in shared} == {name: pins()[name] for name in shared}
