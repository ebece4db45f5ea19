"""Softmax cross-entropy over explicit candidates, on one process."""

import torch.nn.functional as F
from torch import Tensor


def candidate_cross_entropy(
    queries: Tensor, candidates: Tensor, targets: Tensor, first_candidate: int = 0
) -> Tensor:
    """-log softmax(queries candidates^T)[target], the candidates being all ids from the first one on.

    Shapes: queries [T, D], candidates [C, D], targets [T] int64 -> [T] fp32.
    """
    return F.cross_entropy((queries @ candidates.T).float(), targets - first_candidate, reduction="none")
