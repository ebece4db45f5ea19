"""Keys and values of a context that is not encoded: its vectors with a norm, and as keys turned by their places.

On a processor some rows at a time go through all of it, forward and backward, and are read and written once in the
dtype of matrix products; as separate passes over long contexts this took most of a training step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.rms_norm import EPSILON, fill_unit, row_blocks
from models.layers.linear import matmul_dtype
from models.layers.rotary import rotate, turns_of


def turn_normed(vectors: Tensor, weight: Tensor, places: Tensor, *, groups: int) -> tuple[Tensor, Tensor]:
    """The normed vectors in groups, turned by the rotary embedding of their places, and as they are; in the dtype of
    matrix products.

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
    dtype = matmul_dtype(vectors)
    return rotate(normed, places).to(dtype), normed.to(dtype)


class _TurnNormed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vectors: Tensor, weight: Tensor, places: Tensor, groups: int):
        ctx.save_for_backward(vectors, weight, places)
        ctx.set_materialize_grads(False)
        shape, dtype = (groups, len(vectors), vectors.shape[1] // groups), matmul_dtype(vectors)
        # By group, as attention reads them.
        turned, normed = (vectors.new_empty(shape, dtype=dtype).transpose(0, 1) for _ in range(2))
        # Places repeat from user to user.
        ctx.turns = turns_of(torch.arange(int(places.max()) + 1), shape[-1])
        for rows, (unit, work) in row_blocks(vectors, 2):
            fill_unit(vectors[rows], unit)
            normed[rows] = unit.mul_(weight).view(normed[rows].shape)
            _turn(unit, ctx.turns.index_select(0, places[rows]), work)
            turned[rows] = work.view(turned[rows].shape)
        return turned, normed

    @staticmethod
    def backward(ctx, to_turned: Tensor | None, to_normed: Tensor | None):
        vectors, weight, places = ctx.saved_tensors
        to_vectors, to_weight = torch.empty_like(vectors), torch.zeros_like(weight)
        for rows, (unit, work, gradient) in row_blocks(vectors, 3):
            gradient.zero_()
            if to_turned is not None:
                work.view(to_turned[rows].shape).copy_(to_turned[rows])
                _turn(work, ctx.turns.index_select(0, places[rows]).conj(), gradient)
            if to_normed is not None:
                work.view(to_normed[rows].shape).copy_(to_normed[rows])
                gradient.add_(work)
            scale = fill_unit(vectors[rows], unit)
            torch.mul(gradient, unit, out=work)
            to_weight += work.sum(0)
            share = (work @ weight)[:, None] / len(weight)
            to_vectors[rows] = gradient.mul_(weight).sub_(unit.mul_(share)).mul_(scale)
        return to_vectors, to_weight, None, None


def _turn(vectors: Tensor, turns: Tensor, turned: Tensor) -> None:
    """Fill in the turned vectors. Shapes: vectors and turned [n, groups * D] fp32, turns [n, D / 2] complex."""
    pairs, result = (
        torch.view_as_complex(part.view(len(part), -1, turns.shape[1], 2)) for part in (vectors, turned)
    )
    torch.mul(pairs, turns[:, None], out=result)
