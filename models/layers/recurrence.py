"""A recurrent layer over sequences of unequal length."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_streams.jagged import Jagged
from models.kernels.length_buckets import padded_layout, to_cells, to_tokens
from models.layers.linear import without_autocast


class JaggedGRU(nn.GRU):
    """The state after each event, from a state of zeros before the first of each user.

    h' = (1 - z) n + z h with n = tanh(W x + r (U h)), and z, r = sigm of sums of their own (Cho et al., 2014).

    On a processor all users take their n-th step together, the longest first, so that nothing is padded; an
    accelerator would have to wait for the number of users at each step, so there they are padded to the longest. In
    fp32: a step is a small product, which bf16 made slower at width 64 and a fifth quicker at 256.
    """

    def __init__(self, width: int):
        super().__init__(width, width, batch_first=True)

    def forward(self, hidden: Tensor, sequences: Jagged) -> Tensor:
        """Shapes: [T, D] -> [T, D] fp32."""
        hidden = hidden.float()
        with without_autocast(hidden):
            if hidden.shape[0] == 0:
                # All ranks must have gradients of the same weights, those without events too.
                return super().forward(hidden.new_zeros(1, 1, hidden.shape[1]))[0][0, :0] + 0 * hidden.sum()
            return (
                self._in_steps(hidden, sequences)
                if hidden.device.type == "cpu"
                else self.padded(hidden, sequences)
            )

    def padded(self, hidden: Tensor, sequences: Jagged) -> Tensor:
        """The same with users padded to the longest; no event sees what stands behind it. Shapes: [T, D] -> [T, D]."""
        layout = padded_layout(sequences)
        return to_tokens(
            [super(JaggedGRU, self).forward(cells)[0] for cells in to_cells(hidden, layout)], layout
        )

    def _in_steps(self, hidden: Tensor, sequences: Jagged) -> Tensor:
        """The library's own steps over packed sequences cost zeros of the size of all events, each, on the way back."""
        place_of_token, token_of_place, users_of_step = _by_step(sequences)
        inputs = F.linear(hidden.index_select(0, token_of_place), self.weight_ih_l0, self.bias_ih_l0)
        state, states = hidden.new_zeros(users_of_step[0], self.hidden_size), []
        for step in inputs.split(users_of_step):
            state = self._step(step, state[: len(step)])
            states.append(state)
        return torch.cat(states).index_select(0, place_of_token)

    def _step(self, inputs: Tensor, state: Tensor) -> Tensor:
        """Shapes: W x [n, 3 D], state [n, D] -> [n, D]."""
        reset, update, new = inputs.chunk(3, dim=1)
        from_state = F.linear(state, self.weight_hh_l0, self.bias_hh_l0).chunk(3, dim=1)
        new = torch.addcmul(new, (reset + from_state[0]).sigmoid(), from_state[2]).tanh()
        return torch.lerp(new, state, (update + from_state[1]).sigmoid())


def _by_step(sequences: Jagged) -> tuple[Tensor, Tensor, list[int]]:
    """Where each token lies once all first events of users stand in front of all second ones, the longest users first.

    Shapes: place of each token [T], token at each place [T], users that take each step.
    """
    lengths = sequences.lengths
    order = lengths.argsort(descending=True, stable=True)
    users_of_step = lengths.numel() - torch.searchsorted(
        lengths.sort().values, torch.arange(sequences.max_length), right=True
    )
    starts = users_of_step.cumsum(0) - users_of_step
    place_of_token = starts[sequences.places()] + order.argsort()[sequences.row_index()]
    token_of_place = torch.empty_like(place_of_token)
    token_of_place[place_of_token] = torch.arange(len(place_of_token))
    return place_of_token, token_of_place, users_of_step.tolist()
