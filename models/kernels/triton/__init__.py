"""Kernels in Triton, for accelerators; each is one file named like the kernel beside it that it stands in for.

A machine without an accelerator need not have Triton, so they are imported where they run, and not before.
"""

from importlib import import_module
from importlib.util import find_spec

import torch


def is_available(device: torch.device) -> bool:
    """Whether kernels in Triton run on a device."""
    return device.type == "cuda" and find_spec("triton") is not None


def load_kernels(device: torch.device) -> None:
    """Import the kernels of a device, so that the operations they take are known before their first call."""
    if is_available(device):
        import_module("models.kernels.triton.pointwise_attention")
