"""The best of many scores, with ties broken the same way on every device and in every batch."""

import torch
from torch import Tensor

_ROW_MASK = 0xFFFFFFFF
_MAGNITUDE_MASK = 0x7FFFFFFF


def best_cells(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, best first; of equal scores the first cell wins.

    Shapes: [B, n] fp32 -> scores [B, k] fp32, cells [B, k] int64.
    """
    # The bits of an fp32 number sort like the number once those of negative ones are turned around; the lower
    # half holds the cell, inverted. Adding zero makes -0.0 equal to 0.0.
    bits = (scores + 0.0).view(torch.int32)
    bits ^= (bits >> 31).bitwise_and_(_MAGNITUDE_MASK)
    keys = bits.long()
    keys <<= 32
    keys |= _ROW_MASK - torch.arange(scores.shape[1], device=scores.device)
    cells = _ROW_MASK - (keys.topk(k, dim=1).values & _ROW_MASK)
    return scores.gather(1, cells), cells
