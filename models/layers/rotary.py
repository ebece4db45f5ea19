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
    pairs = torch.view_as_complex(vectors.float().unflatten(-1, (-1, 2)))
    turned = pairs * turns_of(positions, vectors.shape[-1])[..., None, :]
    return torch.view_as_real(turned).flatten(-2).to(vectors.dtype)


def turns_of(positions: Tensor, dim: int) -> Tensor:
    """What the pairs of a vector are multiplied by. Shapes: [...] -> [..., dim / 2] complex."""
    places = torch.arange(dim // 2, device=positions.device)
    angles = positions[..., None] * BASE ** (-places / (dim // 2))
    return torch.polar(torch.ones_like(angles), angles)
