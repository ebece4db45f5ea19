"""Keys and values of a context that is not encoded: its vectors with a norm, and as keys turned by their places.

On a processor some rows at a time go through all of it, forward and backward, and are read and written once in the
dtype of matrix products; as separate passes over long contexts this took most of a training step.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.linear import matmul_dtype
from models.layers.rotary import rotate, turns_of

BLOCK_ELEMENTS = 2**19
EPSILON = torch.finfo(torch.float32).eps
"""That of nn.RMSNorm in fp32."""


def turn_normed(
    vectors: Tensor, weight: Tensor, places: Tensor, *, groups: int
) -> tuple[Tensor, Tensor]:
    """The normed vectors in groups, turned by the rotary embedding of their places, and as they are.

    Shapes: vectors [C, groups * D], weight [groups * D], places [C] int64 -> 2 x [C, groups, D].
    """
    if vectors.device.type == "cpu" and len(vectors):
        return _TurnNormed.apply(vectors, weight, places, groups)
    return plain_turn_normed(vectors, weight, places, groups=groups)


def plain_turn_normed(
    vectors: Tensor, weight: Tensor, places: Tensor, *, groups: int
) -> tuple[Tensor, Tensor]:
    """Shapes: as of `turn_normed`."""
    normed = F.rms_norm(vectors.float(), weight.shape, weight, EPSILON).unflatten(-1, (groups, -1))
    return rotate(normed, places), normed


class _TurnNormed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vectors: Tensor, weight: Tensor, places: Tensor, groups: int):
        ctx.save_for_backward(vectors, weight, places)
        ctx.set_materialize_grads(False)
        shape = (len(vectors), groups, vectors.shape[1] // groups)
        turned, normed = (vectors.new_empty(shape, dtype=matmul_dtype(vectors)) for _ in range(2))
        # Places repeat from user to user.
        ctx.turns = turns_of(torch.arange(int(places.max()) + 1), shape[-1])
        for rows in _blocks(vectors):
            unit, _ = _unit(vectors[rows])
            block = unit.mul_(weight).view(-1, *shape[1:])
            normed[rows] = block
            turned[rows] = _turn(block, ctx.turns[places[rows]])
        return turned, normed

    @staticmethod
    def backward(ctx, to_turned: Tensor | None, to_normed: Tensor | None):
        vectors, weight, places = ctx.saved_tensors
        to_vectors, to_weight = torch.empty_like(vectors), torch.zeros_like(weight)
        for rows in _blocks(vectors):
            unit, scale = _unit(vectors[rows])
            gradient = torch.zeros_like(unit) if to_normed is None else to_normed[rows].flatten(1).float()
            if to_turned is not None:
                back = _turn(to_turned[rows].float().contiguous(), ctx.turns[places[rows]].conj())
                gradient = gradient + back.flatten(1)
            by_unit = gradient * unit
            to_weight += by_unit.sum(0)
            share = by_unit.mul_(weight).mean(-1, keepdim=True)
            to_vectors[rows] = (gradient * weight).sub_(unit.mul_(share)).mul_(scale)
        return to_vectors, to_weight, None, None


def _blocks(vectors: Tensor) -> Iterator[slice]:
    size = max(BLOCK_ELEMENTS // vectors.shape[1], 1)
    return (slice(first, first + size) for first in range(0, len(vectors), size))


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of mean square 1, in a tensor of their own, and their scale. Shapes: [n, D] -> [n, D] and [n, 1]."""
    vectors = vectors.float()
    scale = vectors.square().mean(-1, keepdim=True).add_(EPSILON).rsqrt_()
    return vectors * scale, scale


def _turn(vectors: Tensor, turns: Tensor) -> Tensor:
    """Shapes: vectors [n, groups, D] fp32, turns [n, D / 2] complex -> [n, groups, D]."""
    pairs = torch.view_as_complex(vectors.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)
