"""Kernels in Triton, for accelerators; each is one file named like the kernel beside it that it stands in for.

A machine without an accelerator need not have Triton, so they are imported where they run, and not before.
"""

import logging
import os
import shutil
import sysconfig
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


def is_available(device: torch.device) -> bool:
    """Whether kernels in Triton run on a device."""
    return device.type == "cuda" and _can_compile()


def load_kernels(device: torch.device) -> None:
    """Import the kernels of a device, so that the operations they take are known before their first call."""
    if is_available(device):
        import_module("models.kernels.triton.pointwise_attention")


@cache
def _can_compile() -> bool:
    """Triton compiles what calls a kernel in C, at its first use; what is missing for that is told once."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    wanted = {
        "Triton (pip install triton)": find_spec("triton"),
        "a C compiler (gcc or clang, or another named by CC)": os.environ.get("CC")
        or shutil.which("gcc")
        or shutil.which("clang"),
        f"Python's headers ({headers})": headers.is_file(),
    }
    missing = [name for name, found in wanted.items() if not found]
    if missing:
        logger.warning(
            "missing: %s; attention of HSTU is computed on users padded to the longest, which takes many times the "
            "time and memory",
            ", ".join(missing),
        )
    return not missing
