"""Softmax cross-entropy over explicit candidates, on one process."""

import torch
import torch.nn.functional as F
from torch import Tensor


def candidate_cross_entropy(
    queries: Tensor, candidates: Tensor, targets: Tensor, first_candidate: int = 0
) -> Tensor:
    """-log softmax(queries candidates^T)[target], the candidates being all ids from the first one on.

    Shapes: queries [T, D], candidates [C, D], targets [T] int64 -> [T] fp32.
    """
    return F.cross_entropy((queries @ candidates.T).float(), targets - first_candidate, reduction="none")


def matmul_dtype(tensor: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on: a custom autograd function has to apply it by itself."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
