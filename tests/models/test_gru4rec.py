import torch

from data_streams.jagged import Jagged
from models.layers.recurrence import JaggedGRU
from models.recommender import StepContext
from models.tables import LookedUp
from tests.models.test_sasrec import rows_for, users_of_many_lengths
from tests.training_cases import NUM_ITEMS, Case, make_batch, make_model

GRU = Case(model="gru4rec")


def sequences_of(*lengths):
    return Jagged.from_lengths(torch.zeros(sum(lengths), dtype=torch.int64), torch.tensor(lengths))


def hand_written(layer, rows):
    """The cell of Hidasi et al. with the candidate state reset as cuDNN and torch do it, one event at a time."""
    state, states = torch.zeros(rows.shape[1]), []
    for row in rows:
        inputs = (layer.weight_ih_l0 @ row + layer.bias_ih_l0).chunk(3)
        before = (layer.weight_hh_l0 @ state + layer.bias_hh_l0).chunk(3)
        reset, update = ((inputs[gate] + before[gate]).sigmoid() for gate in (0, 1))
        candidate = (inputs[2] + reset * before[2]).tanh()
        state = (1 - update) * candidate + update * state
        states.append(state)
    return torch.stack(states)


def test_users_side_by_side_equal_users_one_by_one_and_padded_ones():
    torch.manual_seed(0)
    layer, sequences = JaggedGRU(8), sequences_of(3, 0, 7, 1, 3)
    hidden, weights = torch.randn(14, 8), torch.randn(14, 8)
    alone = torch.cat([hand_written(layer, rows) for rows in hidden.split([3, 7, 1, 3])])
    found = []
    for run in (layer, layer.padded):
        inputs = hidden.clone().requires_grad_()
        states = run(inputs, sequences)
        torch.testing.assert_close(states, alone)
        found.append(torch.autograd.grad((states * weights).sum(), [inputs, *layer.parameters()]))
    torch.testing.assert_close(*found)


def test_without_events_all_weights_have_gradients_of_zero():
    layer, hidden = JaggedGRU(8), torch.zeros(0, 8, requires_grad=True)
    layer(hidden, sequences_of(0, 0)).sum().backward()
    assert hidden.grad.shape == (0, 8)
    assert all(weights.grad is not None and not weights.grad.any() for weights in layer.parameters())


def test_no_state_depends_on_a_later_event_or_on_another_user():
    model = make_model(GRU).eval()
    table = torch.randn(NUM_ITEMS, 16, generator=torch.Generator().manual_seed(0))
    batch = make_batch(users_of_many_lengths())
    changed = batch.items.values.clone()
    last = batch.items.offsets[3] - 1
    changed[last] = (changed[last] + 1) % NUM_ITEMS
    before, after = (
        model.encode(LookedUp(ids=items, rows=table[items]), batch) for items in (batch.items.values, changed)
    )
    others = torch.arange(len(changed)) != last
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[last], after[last])


def test_the_loss_of_packed_users_is_that_of_users_one_by_one():
    model = make_model(GRU).eval()
    table = torch.randn(NUM_ITEMS, 16, generator=torch.Generator().manual_seed(0))
    losses = [
        sum(model(rows_for(model, batch, table), batch, StepContext(step=3, seed=1)).sum for batch in batches)
        for batches in (
            [make_batch(users_of_many_lengths())],
            [make_batch([user]) for user in users_of_many_lengths()],
        )
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_weights_begin_within_the_bounds_of_one_gate():
    layer = make_model(GRU).blocks[0].recurrence
    bound = (6 / (16 + 16)) ** 0.5
    assert not layer.bias_ih_l0.any() and not layer.bias_hh_l0.any()
    for matrix in (layer.weight_ih_l0, layer.weight_hh_l0):
        for gate in matrix.chunk(3):
            assert 0.8 * bound < gate.abs().max() <= bound
