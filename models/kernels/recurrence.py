"""A recurrent layer over sequences of unequal length."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from data_streams.jagged import Jagged
from models.kernels.length_buckets import padded_layout, to_cells, to_tokens
from models.layers.linear import without_autocast


def run_recurrence(layer: nn.GRU, hidden: Tensor, sequences: Jagged) -> Tensor:
    """The state after each event, from a state of zeros before the first of each user.

    On a processor all users take their n-th step together, the longest first, so that nothing is padded; an
    accelerator would have to wait for the number of users at each step, so there they are padded to the longest. In
    fp32: a step is a small product, which bf16 made slower at width 64 and a fifth quicker at 256.

    `layer` has batch_first. Shapes: [T, D] -> [T, H] fp32.
    """
    hidden = hidden.float()
    with without_autocast(hidden):
        if hidden.shape[0] == 0:
            # All ranks must have gradients of the same weights, those without events too.
            return layer(hidden.new_zeros(1, 1, hidden.shape[1]))[0][0, :0] + 0 * hidden.sum()
        if hidden.device.type == "cpu":
            return _in_steps(layer, hidden, sequences)
        return padded_recurrence(layer, hidden, sequences)


def padded_recurrence(layer: nn.GRU, hidden: Tensor, sequences: Jagged) -> Tensor:
    """The same with users padded to the longest; no event sees what stands behind it. Shapes: [T, D] -> [T, H]."""
    layout = padded_layout(sequences)
    return to_tokens([layer(cells)[0] for cells in to_cells(hidden, layout)], layout)


def _in_steps(layer: nn.GRU, hidden: Tensor, sequences: Jagged) -> Tensor:
    lengths = sequences.lengths
    order = lengths.argsort(descending=True, stable=True)
    users_of_step = lengths.numel() - torch.searchsorted(
        lengths.sort().values, torch.arange(sequences.max_length), right=True
    )
    starts = users_of_step.cumsum(0) - users_of_step
    place_of_token = starts[sequences.places()] + order.argsort()[sequences.row_index()]
    token_of_place = torch.empty_like(place_of_token)
    token_of_place[place_of_token] = torch.arange(len(place_of_token))
    packed = PackedSequence(hidden.index_select(0, token_of_place), users_of_step)
    return layer(packed)[0].data.index_select(0, place_of_token)
