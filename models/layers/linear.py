"""Linear layers over jagged rows, whose number changes from step to step."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNMENT_ROWS = 64
MOST_ALIGNED = 2**22
"""Numbers in the rows from which on a copy of them takes longer than to compile."""


class Linear(nn.Linear):
    """nn.Linear that, on a processor in bf16, computes a multiple of 64 rows.

    There the library compiles (and keeps) code for every shape it meets, and jagged batches bring a new number of
    rows at every step: that took a quarter of the time of the matrix products.
    """

    def forward(self, rows: Tensor) -> Tensor:
        """Shapes: [T, in] -> [T, out]."""
        aligned = align_rows(rows)
        if aligned is rows:
            return super().forward(rows)
        return super().forward(aligned)[: rows.shape[0]]


def align_rows(rows: Tensor) -> Tensor:
    """Append zero rows up to a multiple of 64 where that saves compiling. Shapes: [T, D] -> [T', D]."""
    compiles = rows.device.type == "cpu" and (
        rows.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    )
    missing = -rows.shape[0] % ALIGNMENT_ROWS if rows.numel() < MOST_ALIGNED else 0
    return F.pad(rows, (0, 0, 0, missing)) if compiles and missing else rows


def matmul_dtype(tensor: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on: a custom autograd function has to apply it by itself."""
    device = tensor.device.type
    # There is no autocast on the meta device, where models are only counted.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """For products whose dtype is chosen by hand."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
