"""Rotary positions: an inner product of rotated vectors depends on how far apart they stand.

Source: Su et al., RoFormer (2021).
"""

import torch
from torch import Tensor

BASE = 10_000.0


def rotate(vectors: Tensor, positions: Tensor) -> Tensor:
    """Pairs of elements (i, i + D / 2) turned by position * 10000 ** (-2 i / D).

    Shapes: vectors [..., heads, D] with an even D, positions [...] -> [..., heads, D].
    """
    half = vectors.shape[-1] // 2
    places = torch.arange(half, device=vectors.device)
    angles = positions[..., None, None] * BASE ** (-places / half)
    cosine, sine = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    first, second = vectors[..., :half], vectors[..., half:]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
