"""Rotary positions: an inner product of rotated vectors depends on how far apart they stand.

Source: Su et al., RoFormer (2021).
"""

import torch
from torch import Tensor

BASE = 10_000.0


def rotate(vectors: Tensor, positions: Tensor) -> Tensor:
    """Neighbouring elements 2 i and 2 i + 1 turned as a pair by position * 10000 ** (-2 i / D).

    Shapes: vectors [..., heads, D] with an even D, positions [...] -> [..., heads, D].
    """
    half = vectors.shape[-1] // 2
    places = torch.arange(half, device=vectors.device)
    angles = positions[..., None, None] * BASE ** (-places / half)
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(vectors.float().unflatten(-1, (half, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(vectors.dtype)
