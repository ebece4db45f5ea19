"""Attention of shown items to what their user took before they were shown.

Every token may ask; only some tokens, the user's keys, can be attended to. A query sees the first so many keys of its
user, the later ones of them more strongly. A silent key with score 0 stands beside them, so that a user without a
history, or one to whom nothing is alike, gets a small sum instead of an average.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from data_streams.jagged import Jagged
from models.kernels.length_buckets import BucketLayout, padding_cells, to_cells, to_tokens
from models.kernels.softmax_cells import attend_cells, hidden_bias
from models.layers.linear import without_autocast

NO_KEY = -1


def interest_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    key_numbers: Tensor,
    num_visible: Tensor,
    slopes: Tensor,
    layout: BucketLayout,
) -> Tensor:
    """sum_k w_k v_k with w = softmax over (0, q k / sqrt(D) - slope * age) without the first; the age of the latest
    visible key is 1.

    Shapes: queries, keys, values [T, heads, D]; key_numbers [T] int64, place of a token among the keys of its user, -1
    for none; num_visible [T] int64, how many of them each query sees; slopes [heads] -> [T, heads, D].
    """
    if queries.shape[0] == 0:
        return queries * keys * values
    padding = padding_cells(layout)
    numbers, visible = (column.index_select(0, layout.token_of_cell) for column in (key_numbers, num_visible))
    if padding is not None:
        numbers, visible = numbers.masked_fill(padding[:, 0], NO_KEY), visible.masked_fill(padding[:, 0], 0)
    # One at least, which nobody then sees. On an accelerator it is not asked for, which would wait for it.
    most = max(int(key_numbers.max()) + 1, 1) if queries.device.type == "cpu" else math.inf
    outputs, start = [], 0
    for cells in to_cells(torch.stack((queries, keys, values), dim=1), layout):
        users, length = cells.shape[:2]
        here = slice(start, start + users * length)
        start = here.stop
        outputs.append(
            _attend(
                *cells.unbind(2),
                numbers[here].view(users, length),
                visible[here].view(users, length),
                slopes,
                min(most, length),
            )
        )
    return to_tokens(outputs, layout)


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    numbers: Tensor,
    visible: Tensor,
    slopes: Tensor,
    most: int,
) -> Tensor:
    """Shapes: queries, keys, values [U, L, heads, D]; numbers, visible [U, L] -> [U, L, heads, D]."""
    places = torch.arange(numbers.shape[1], device=numbers.device).expand_as(numbers)
    # Tokens that are no keys all go to one last slot, which is dropped.
    slots = torch.where((numbers >= 0) & (numbers < most), numbers, most)
    token_of_key = numbers.new_zeros(numbers.shape[0], most + 1).scatter(1, slots, places)[:, :most]
    chosen = token_of_key[:, :, None, None].expand(-1, -1, *keys.shape[2:])
    keys, values = keys.gather(1, chosen).float(), values.gather(1, chosen).float()
    age = visible[:, :, None] - torch.arange(most, device=numbers.device)
    with without_autocast(queries):
        bias = -slopes[:, None, None] * age[:, None]
        parts = (part.transpose(1, 2) for part in (queries.float(), keys, values))
        attended, log_sum = attend_cells(*parts, hidden_bias(age <= 0)[:, None], bias)
        # The share that the silent key leaves.
        return (attended * log_sum.sigmoid()).transpose(1, 2).to(queries.dtype)


def reference_interest_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    key_numbers: Tensor,
    num_visible: Tensor,
    slopes: Tensor,
    sequences: Jagged,
) -> Tensor:
    """The same, token by token and written out."""
    outputs = []
    for start, stop in pairwise(sequences.offsets.tolist()):
        own = [token for token in range(start, stop) if key_numbers[token] >= 0]
        for token in range(start, stop):
            seen = own[: int(num_visible[token])]
            age = torch.arange(len(seen), 0, -1)
            scores = (keys[seen] * queries[token]).sum(-1) / queries.shape[-1] ** 0.5 - slopes * age[:, None]
            weights = scores.exp() / (1 + scores.exp().sum(0))
            outputs.append((weights[..., None] * values[seen]).sum(0))
    return torch.stack(outputs)
