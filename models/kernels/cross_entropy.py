"""Softmax cross-entropy over explicit candidates, on one process."""

import torch.nn.functional as F
from torch import Tensor


def candidate_cross_entropy(queries: Tensor, candidates: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(queries candidates^T)[target], with the candidates being the whole vocabulary in order.

    Shapes: queries [T, D], candidates [C, D], targets [T] int64 in 0..C-1 -> [T] fp32.
    """
    return F.cross_entropy((queries @ candidates.T).float(), targets, reduction="none")
