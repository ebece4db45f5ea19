"""A few queries of each user over a long context that several layers read: what it costs is to read the context.

So its keys and values stay as they lie, all heads side by side, and one product serves all heads: the queries of a
head have zeros in the place of the others. And what all layers make of the gradients of keys and values is
computed at once, when the way back reaches them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.linear import without_autocast


class SharedContext:
    """Keys and values of users, handed to the queries of any number of layers."""

    def __init__(self, keys: Tensor, values: Tensor):
        """Shapes: keys and values [users, C, groups, D]."""
        self.groups = keys.shape[2]
        self.asked: list[tuple[Tensor, ...] | None] = []
        """What each call of `attend` leaves behind on the way back."""
        self.keys, self.values = _Handed.apply(keys.flatten(2), values.flatten(2), self.asked)

    def attend(self, queries: Tensor, hidden: Tensor) -> Tensor:
        """Shapes: queries [users, N, L, heads, D], hidden [users, N, C] bool, N = 1 -> [users, N, L, heads, D]."""
        dtype, dim = self.keys.dtype, queries.shape[-1]
        heads = torch.arange(queries.shape[3], device=queries.device) // (queries.shape[3] // self.groups)
        own = F.one_hot(heads, self.groups).to(dtype)[..., None]
        spread = (queries * dim**-0.5).to(dtype)[..., None, :] * own
        rows = spread.flatten(4).flatten(1, 3)
        attended = _Attend.apply(rows, self.keys, self.values, hidden, self.asked)
        return (attended.view(spread.shape) * own).sum(4).to(queries.dtype)


class _Handed(torch.autograd.Function):
    """Keys and values as they are; on the way back, the products of all layers that asked since in one."""

    @staticmethod
    def forward(ctx, keys: Tensor, values: Tensor, asked: list[tuple[Tensor, ...] | None]):
        ctx.asked = asked
        ctx.set_materialize_grads(False)
        return keys.view_as(keys), values.view_as(values)

    @staticmethod
    def backward(ctx, to_keys: None, to_values: None):
        left = [parts for parts in ctx.asked if parts is not None]
        ctx.asked[:] = [None] * len(ctx.asked)
        queries, to_scores, weights, gradients = (
            torch.cat(parts, dim=1) for parts in zip(*left, strict=True)
        )
        return to_scores.transpose(1, 2) @ queries, weights.transpose(1, 2) @ gradients, None


class _Attend(torch.autograd.Function):
    """Softmax attention whose gradients to keys and values are left to `_Handed`, which comes behind all of them."""

    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, asked: list):
        ctx.asked, ctx.number = asked, len(asked)
        asked.append(None)
        with without_autocast(queries):
            scores = (queries @ keys.transpose(1, 2)).float()
            # Not -inf: where everything is hidden, it would be NaN.
            weights = scores.masked_fill_(hidden, torch.finfo(torch.float32).min).softmax(-1)
            attended = weights.to(values.dtype) @ values
        ctx.save_for_backward(queries, keys, values, weights)
        return attended

    @staticmethod
    def backward(ctx, gradient: Tensor):
        queries, keys, values, weights = ctx.saved_tensors
        to_weights = (gradient @ values.transpose(1, 2)).float()
        to_scores = torch._softmax_backward_data(to_weights, weights, -1, torch.float32).to(keys.dtype)
        ctx.asked[ctx.number] = (queries, to_scores, weights.to(values.dtype), gradient)
        return to_scores @ keys, None, None, None, None
