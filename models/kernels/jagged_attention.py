"""Causal softmax attention over users of unequal length.

`jagged_attention` is the one entry. In half precision on an accelerator it is torch's FlashAttention over sequences of
unequal length, elsewhere it works on length buckets. `reference_attention` computes user by user and is what both are
tested against.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from data_streams.jagged import Jagged
from models.kernels.length_buckets import Bounds, BucketLayout, pair_dtype, to_cells, to_tokens
from models.layers.linear import matmul_dtype


def jagged_attention(queries: Tensor, keys: Tensor, values: Tensor, layout: BucketLayout) -> Tensor:
    """Each token attends to itself and to the earlier tokens of its user.

    Shapes: queries, keys, values [T, heads, D] -> [T, heads, D].
    """
    if queries.shape[0] == 0:
        return queries * keys * values
    if _has_jagged_kernel(queries, layout):
        return _attend_jagged(queries, keys, values, layout.bounds)
    stacked = torch.stack((queries, keys, values), dim=1)
    blocks = [
        _causal_attention(*cells.permute(2, 0, 3, 1, 4)).transpose(1, 2)
        for cells in to_cells(stacked, layout)
    ]
    return to_tokens(blocks, layout)


def _has_jagged_kernel(queries: Tensor, layout: BucketLayout) -> bool:
    """It takes half precision alone, and rows of whole 16 bytes."""
    is_half = queries.device.type == "cuda" and matmul_dtype(queries) in (torch.bfloat16, torch.float16)
    return is_half and layout.bounds is not None and queries.shape[-1] % 8 == 0 and queries.shape[-1] <= 256


def _attend_jagged(queries: Tensor, keys: Tensor, values: Tensor, bounds: Bounds) -> Tensor:
    """Shapes: [T, heads, D] each -> [T, heads, D]."""
    from torch.nn.attention.varlen import varlen_attn  # seconds of every start that does not need it

    dtype, offsets, longest = matmul_dtype(queries), bounds.offsets, bounds.longest
    q, k, v = (part.to(dtype) for part in (queries, keys, values))
    return varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0))


def _causal_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Shapes: [users, heads, L, D] each -> [users, heads, L, D]."""
    users, num_heads, length, dim = queries.shape
    if queries.device.type != "cpu":
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    dtype = pair_dtype(queries, length)
    q, k, v = (part.reshape(users * num_heads, length, dim).to(dtype) for part in (queries, keys, values))
    later = torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
    with torch.autocast("cpu", enabled=False):
        weights = torch.baddbmm(later, q, k.transpose(1, 2), alpha=dim**-0.5).softmax(-1)
        return torch.bmm(weights, v).view(users, num_heads, length, dim)


def reference_attention(queries: Tensor, keys: Tensor, values: Tensor, sequences: Jagged) -> Tensor:
    """The same, user by user and written out: softmax(q k^T / sqrt(D)) v over the tokens up to each token.

    Shapes: queries, keys, values [T, heads, D] -> [T, heads, D].
    """
    outputs = []
    bounds = sequences.offsets.tolist()
    for start, stop in pairwise(bounds):
        q, k, v = (part[start:stop].transpose(0, 1) for part in (queries, keys, values))
        scores_HTT = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
        weights = scores_HTT.masked_fill(later, float("-inf")).softmax(-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)
