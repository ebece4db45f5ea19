from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.errors import ConfigError
from models.hstu import HSTU, TIME
from models.kernels.pointwise_attention import PairBias, reference_pointwise_attention
from models.objectives.full_softmax import FullSoftmax
from models.recommender import StepContext
from models.tables import LookedUp
from tests.training_cases import NUM_ITEMS, make_batch

MAX_LENGTH = 12
WIDTH = 16


def make_model(**options):
    torch.manual_seed(5)
    config = HSTU.Config(
        **{"width": WIDTH, "num_heads": 2, "dropout": 0.0, "init_scale": 0.1, "attention_dim": 4, **options}
    )
    objective = FullSoftmax.Config(temperature=0.2).build(num_items=NUM_ITEMS)
    return config.build(num_items=NUM_ITEMS, max_length=MAX_LENGTH, item_feature_dim=0, objective=objective)


def make_users(lengths=(1, 12, 5, 5, 7, 2)):
    generator = torch.Generator().manual_seed(4)
    sequences = [torch.randint(NUM_ITEMS, (length + 1,), generator=generator) for length in lengths]
    return make_batch(sequences)


def make_table():
    return torch.randn(NUM_ITEMS, WIDTH, generator=torch.Generator().manual_seed(0))


def rows_of(model, batch):
    table = make_table()
    return {
        name: LookedUp(ids=ids, rows=table[ids])
        for name, ids in model.ids(batch, StepContext(step=3, seed=1)).items()
    }


def encode(model, batch):
    return model.encode(LookedUp(ids=batch.items.values, rows=make_table()[batch.items.values]), batch)


def test_the_states_are_those_of_the_papers_layer_written_out():
    model, batch = make_model().eval(), make_users()
    within = torch.cat([torch.arange(length) for length in batch.items.lengths.tolist()])
    hidden = make_table()[batch.items.values] * WIDTH**0.5 + model.positions(within)
    for block in model.blocks:
        normalised = F.layer_norm(hidden, (WIDTH,), eps=1e-6)
        queries, keys, values = (
            F.silu(normalised @ block.projection.weight.T).view(-1, 2, 16).split((4, 4, 8), -1)
        )
        gates = F.silu(normalised @ block.gate.weight.T)
        attended = reference_pointwise_attention(
            queries,
            keys,
            values,
            batch.items,
            max_length=MAX_LENGTH,
            bias=PairBias(**dict(zip(("by_distance", "by_time"), block.pair_bias(), strict=True))),
            times_s=batch.features[TIME],
        )
        gated = gates * F.layer_norm(attended.flatten(1), (16,), eps=1e-6)
        hidden = hidden + gated @ block.output.weight.T + block.output.bias
    torch.testing.assert_close(encode(model, batch), hidden, atol=1e-5, rtol=1e-4)


def test_packed_users_equal_users_one_by_one():
    model, batch = make_model().eval(), make_users()
    together = model(rows_of(model, batch), batch, StepContext(step=3, seed=1))
    alone = [batch.select(user, user + 1) for user in range(batch.num_users)]
    losses = [model(rows_of(model, user), user, StepContext(step=3, seed=1)) for user in alone]
    assert together.count == sum(loss.count for loss in losses)
    torch.testing.assert_close(together.sum, sum(loss.sum for loss in losses), rtol=1e-5, atol=1e-4)


def test_no_state_depends_on_later_items_or_times():
    model, batch = make_model().eval(), make_users((8,))
    items = batch.items.values.clone()
    items[5:] = (items[5:] + 1) % NUM_ITEMS
    times_s = batch.features[TIME].clone()
    times_s[5:] += 10**7
    changed = replace(batch, items=batch.items.with_values(items), features={TIME: times_s})
    before, after = encode(model, batch), encode(model, changed)
    assert torch.equal(before[:5], after[:5])
    assert not torch.allclose(before[5:], after[5:])


def test_without_the_time_bias_no_times_are_needed():
    model = make_model(time_bias=False)
    batch = replace(make_users(), features={})
    assert model.config.event_columns == ()
    assert encode(model, batch).shape == (batch.num_tokens, WIDTH)


def test_times_change_the_states():
    model, batch = make_model().eval(), make_users()
    closer = replace(batch, features={TIME: batch.features[TIME] // 1000})
    assert not torch.allclose(encode(model, batch), encode(model, closer))


def test_stochastic_length_is_for_training_batches_only_when_asked_for():
    batch, context = make_users((12, 12, 12, 12)), StepContext(step=0)
    assert make_model().training_batch(batch, context) is batch
    shortened = make_model(stochastic_length=1.2).training_batch(batch, context)
    assert shortened.num_tokens < batch.num_tokens
    assert shortened.targets.shape == shortened.items.values.shape


@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_a_stochastic_length_out_of_range_is_refused(alpha):
    with pytest.raises(ConfigError, match=r"must lie in \(1, 2\]"):
        make_model(stochastic_length=alpha)


def test_a_step_of_no_users_has_no_loss_but_a_gradient_path():
    model = make_model()
    batch = make_users((3,)).select(0, 0)
    table = make_table().requires_grad_()
    ids = model.ids(batch, StepContext(step=0))
    rows = {name: LookedUp(ids=values, rows=table[values]) for name, values in ids.items()}
    loss = model(rows, batch, StepContext(step=0))
    loss.sum.backward()
    assert loss.count == 0 and loss.sum.item() == 0
    # DeepSpeed exchanges the gradients that are there: a rank without users must have as many as the others.
    assert all(parameter.grad is not None for parameter in model.parameters())


class Roundings(TorchDispatchMode):
    """Widths of what is rounded to bf16 and has as many rows as a batch has events, or some more."""

    def __init__(self, num_events):
        super().__init__()
        self.num_events, self.widths = num_events, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function == torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.widths += [result.shape[-1]] * (result.shape[0] >= self.num_events)
        return result


def test_what_two_layers_of_a_block_read_is_rounded_once():
    # More events than any weight has rows, and no other layer that reads so many columns.
    model, batch = make_model(num_blocks=1, value_dim=12).eval(), make_users((12, 12, 12, 12))
    with Roundings(batch.num_tokens) as roundings, torch.autocast("cpu", dtype=torch.bfloat16):
        encode(model, batch)
    assert roundings.widths.count(WIDTH) == 1
