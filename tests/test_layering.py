"""The walls between the packages, read from the source and checked by importing."""

import ast
import os
import subprocess
import sys

import pytest

from tests.blocked_imports import without
from tests.source_tree import LAYERS, ROOT, dotted_name, imports, is_within, sources

DEEPSPEED_FILES = {"trainer/dense_engine.py", "sharding/experts.py"}
ACTOR_FILE = "cluster/placement.py"
TASK_FILE = "cluster/tasks.py"
PLACING_MODULES = ("ray.remote", "ray.actor", "ray.util.placement_group", "ray.util.scheduling_strategies")
BATCH_TYPES = ("data_streams.jagged", "data_streams.batch")
HEAVY_MODULES = ("ray", "deepspeed", "torchrec", "fbgemm_gpu")


def imports_of(*packages: str):
    for path, tree in sources(*packages).items():
        for module, line in imports(tree, path):
            yield path, line, module


def run_python(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_imports_run_in_one_direction():
    upward = [
        f"{path}:{line} imports {module}"
        for rank, package in enumerate(LAYERS)
        for path, line, module in imports_of(package)
        if is_within(module, *LAYERS[:rank], "tests", "benchmarks")
    ]
    assert not upward, "imports may only go " + " -> ".join(LAYERS) + ":\n" + "\n".join(upward)


def test_models_know_only_the_batch_types_of_the_data():
    wrong = [
        f"{path}:{line} imports {module}"
        for path, line, module in imports_of("models")
        if is_within(module, "data_streams") and not is_within(module, *BATCH_TYPES)
    ]
    assert not wrong, f"models may import {BATCH_TYPES} of data_streams only:\n" + "\n".join(wrong)


def test_only_sharding_touches_torchrec():
    wrong = [
        f"{path}:{line}"
        for path, line, module in imports_of(*LAYERS)
        if is_within(module, "torchrec", "fbgemm_gpu") and not path.startswith("sharding/")
    ]
    assert not wrong, f"torchrec and fbgemm belong into sharding/: {wrong}"


def test_two_files_touch_deepspeed():
    users = {path for path, _, module in imports_of(*LAYERS) if is_within(module, "deepspeed")}
    assert users <= DEEPSPEED_FILES, f"only {DEEPSPEED_FILES} may import deepspeed, and {users} do"


def test_only_data_streams_touches_tar_shards():
    wrong = [
        f"{path}:{line}"
        for path, line, module in imports_of(*LAYERS)
        if is_within(module, "webdataset", "tarfile") and not path.startswith("data_streams/")
    ]
    assert not wrong, f"tar shards are read and written in data_streams/: {wrong}"


def test_one_file_places_ray_actors():
    wrong = [
        f"{path}:{line} uses {name}"
        for path, tree in sources(*LAYERS).items()
        if path != ACTOR_FILE
        for line, name in placements(tree, path)
    ]
    assert not wrong, f"actors and placement groups belong into {ACTOR_FILE}:\n" + "\n".join(wrong)


def placements(tree: ast.Module, path: str):
    """Uses of ray.remote and of placement groups; tasks made of functions are allowed in their own file."""
    for module, line in imports(tree, path):
        if is_within(module, *PLACING_MODULES):
            yield line, module
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            if any(dotted_name(decorator) == "ray.remote" for decorator in node.decorator_list):
                yield node.lineno, "an actor class, @ray.remote"
        elif isinstance(node, ast.Attribute) and dotted_name(node) == "ray.remote" and path != TASK_FILE:
            yield node.lineno, "ray.remote"


@pytest.mark.parametrize(
    "code",
    [
        "import ray\n@ray.remote\nclass Worker: ...",
        "import ray\n@ray.remote(num_cpus=1)\nclass Worker: ...",
        "import ray\nray.remote(Worker).remote()",
        "from ray import remote",
        "from ray.util.placement_group import placement_group",
    ],
)
def test_placing_an_actor_is_recognised(code):
    assert list(placements(ast.parse(code), "trainer/pretrain.py"))


def test_the_command_line_starts_without_torch():
    run_python(
        "import sys, launch.cli\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'torchrec'} & set(sys.modules)\n"
        "assert not heavy, f'import launch.cli pulls in {heavy}; import them after the arguments are parsed'"
    )


def test_models_and_the_unsharded_reference_run_without_the_distributed_stack():
    modules = [
        path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in sources("models")
        if not path.startswith("models/kernels/triton")
    ]
    run_python(
        f"{without(HEAVY_MODULES)}import importlib\n"
        f"for name in {[*modules, 'sharding.unsharded']}:\n"
        "    importlib.import_module(name)\n"
    )
