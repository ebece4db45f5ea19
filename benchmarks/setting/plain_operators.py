"""HSTU and SASRec with plain operators of torch in place of our kernels: what a step was before them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.cross_entropy import reference_cross_entropy
from models.kernels.length_buckets import padded_layout, to_cells, to_tokens
from models.kernels.pointwise_attention import EventPairs, PairBias
from models.layers.dropout import Dropout


@contextmanager
def plain_operators() -> Iterator[None]:
    """Users padded to the longest one, all scores of all targets at once, a float drawn for each dropped element."""
    whole = SimpleNamespace(
        apply=lambda queries, candidates, targets: reference_cross_entropy(
            queries, candidates, targets, len(candidates)
        )
    )
    places = {
        "models.kernels.pointwise_attention.bucket_layout": padded_layout,
        "models.sasrec.bucket_layout": padded_layout,
        "models.hstu.pointwise_attention": padded_attention,
        "models.kernels.cross_entropy._CandidateCrossEntropy": whole,
        "models.layers.linear.align_rows": lambda rows: rows,
    }
    with ExitStack() as stack:
        for name, plain in places.items():
            stack.enter_context(patch(name, plain))
        stack.enter_context(patch.object(Dropout, "forward", _dropout))
        yield


def _dropout(layer: Dropout, values: Tensor) -> Tensor:
    return F.dropout(values, layer.threshold / 256, layer.training)


def padded_attention(
    packed: Tensor, attention_dim: int, pairs: EventPairs, *, max_length: int, bias: PairBias
) -> Tensor:
    """`models.kernels.pointwise_attention` written out. Shapes: packed [T, heads, A + A + V] -> [T, heads, V]."""
    (cells,) = to_cells(packed, pairs.layout)
    sizes = (attention_dim, attention_dim, packed.shape[-1] - 2 * attention_dim)
    queries, keys, values = cells.transpose(1, 2).split(sizes, -1)
    scores = queries @ keys.transpose(2, 3)
    place = torch.arange(scores.shape[-1])
    if bias.by_distance is not None:
        scores = scores + bias.by_distance[(place[:, None] - place).clamp(min=0)]
    if bias.by_time is not None:
        scores = scores + bias.by_time[pairs.buckets[0]][:, None]
    weights = F.silu(scores) / max_length * (place[:, None] >= place)
    return to_tokens([(weights @ values).transpose(1, 2)], pairs.layout)
