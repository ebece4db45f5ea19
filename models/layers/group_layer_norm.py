"""Layer norm with an affine part of its own for every group of tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPSILON = 1e-6


class GroupLayerNorm(nn.Module):
    """Mean and variance are those of the token; scale and shift those of its group.

    Source: MTGR (Meituan, 2025), arXiv 2505.18654.
    """

    def __init__(self, num_groups: int, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_groups, width))
        self.shift = nn.Parameter(torch.zeros(num_groups, width))

    def forward(self, rows: Tensor, membership: Tensor) -> Tensor:
        """Shapes: rows [T, D], membership [T, groups], 1 in the column of the token's group -> [T, D]."""
        normalised = F.layer_norm(rows.float(), rows.shape[-1:], eps=NORM_EPSILON)
        # As products, whose way back is a product too; that of an index would add row by row.
        return normalised * (membership @ self.scale) + membership @ self.shift
