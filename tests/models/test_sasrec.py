import torch
import torch.nn.functional as F
from torch import nn

from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.layers.dropout import Dropout
from models.objectives.sampled_softmax import SampledSoftmax
from models.recommender import StepContext
from models.sasrec import SASRec
from models.tables import LookedUp
from tests.training_cases import NUM_ITEMS, Case, make_batch, make_features, make_model


def rows_for(model, batch, table, features=None):
    ids = model.ids(batch, StepContext(step=3, seed=1))
    gathered = {} if features is None else {name: features.gather(values) for name, values in ids.items()}
    return {
        name: LookedUp(ids=values, rows=table[values], item_features=gathered.get(name))
        for name, values in ids.items()
    }


def users_of_many_lengths():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(NUM_ITEMS, (length + 1,), generator=generator) for length in (1, 12, 5, 5, 7, 2)]


def test_packed_users_equal_users_one_by_one():
    case = Case(item_features=True)
    model, features = make_model(case).eval(), make_features(case)
    table = torch.randn(NUM_ITEMS, 16, generator=torch.Generator().manual_seed(0))
    users = users_of_many_lengths()
    packed = make_batch(users)
    together = model(rows_for(model, packed, table, features), packed, StepContext(step=3, seed=1))
    alone = []
    for user in users:
        batch = make_batch([user])
        alone.append(model(rows_for(model, batch, table, features), batch, StepContext(step=3, seed=1)))
    assert together.count == sum(loss.count for loss in alone)
    torch.testing.assert_close(together.sum, sum(loss.sum for loss in alone), rtol=1e-5, atol=1e-5)


def test_jagged_states_equal_a_padded_transformer_written_with_torch_modules():
    model = make_model(Case()).eval()
    table = torch.randn(NUM_ITEMS, 16, generator=torch.Generator().manual_seed(0))
    batch = make_batch(users_of_many_lengths())
    states = model.encode(LookedUp(ids=batch.items.values, rows=table[batch.items.values]), batch)
    expected = padded_states(model, table, batch)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


def padded_states(model, table, batch):
    """The same network on a padded block through torch's own multi-head attention."""
    lengths, width = batch.items.lengths.tolist(), batch.items.max_length
    ids = nn.utils.rnn.pad_sequence(batch.items.values.split(lengths), batch_first=True)
    hidden = table[ids] * 16**0.5 + model.positions(torch.arange(width))
    later = torch.ones(width, width, dtype=torch.bool).triu(1)
    for block in model.blocks:
        attention = nn.MultiheadAttention(16, 2, batch_first=True, bias=True).eval()
        attention.in_proj_weight.data.copy_(block.query_key_value.weight)
        attention.in_proj_bias.data.zero_()
        attention.out_proj.load_state_dict(block.attention_output.state_dict())
        normalised = block.attention_norm(hidden)
        hidden = (
            hidden + attention(normalised, normalised, normalised, attn_mask=later, need_weights=False)[0]
        )
        inner = F.relu(block.feedforward_input(block.feedforward_norm(hidden)))
        hidden = hidden + block.feedforward_output(inner)
    hidden = model.final_norm(hidden)
    return torch.cat([hidden[i, :length] for i, length in enumerate(lengths)])


def test_the_query_is_the_state_after_the_last_event():
    model = make_model(Case()).eval()
    table = torch.randn(NUM_ITEMS, 16, generator=torch.Generator().manual_seed(0))
    batch = make_batch(users_of_many_lengths())
    rows = {"history": LookedUp(ids=batch.items.values, rows=table[batch.items.values])}
    states = model.encode(rows["history"], batch)
    expected = model.objective.queries(states[batch.items.offsets[1:] - 1])
    torch.testing.assert_close(model.query(rows, batch), expected)


def test_no_state_depends_on_later_events():
    model = make_model(Case()).eval()
    table = torch.randn(NUM_ITEMS, 16, generator=torch.Generator().manual_seed(0))
    first = torch.tensor([3, 5, 7, 9, 11])
    changed = torch.tensor([3, 5, 7, 90, 91])
    states = []
    for items in (first, changed):
        batch = SequenceBatch(
            user_ids=torch.zeros(1, dtype=torch.int64), items=Jagged.from_lengths(items, torch.tensor([5]))
        )
        states.append(model.encode(LookedUp(ids=items, rows=table[items]), batch))
    assert torch.equal(states[0][:3], states[1][:3])
    assert not torch.allclose(states[0][3:], states[1][3:])


def test_item_features_give_an_untrained_item_a_vector():
    case = Case(item_features=True)
    model, features = make_model(case), make_features(case)
    ids = torch.tensor([1, 2])
    vectors = model.item_vectors(
        LookedUp(ids=ids, rows=torch.zeros(2, 16), item_features=features.gather(ids))
    )
    projected = F.normalize(model.feature_projection(features.gather(ids)), dim=-1, eps=1e-6)
    torch.testing.assert_close(vectors, projected)


def test_a_step_of_no_users_has_no_loss_but_a_gradient_path():
    model = make_model(Case())
    table = torch.randn(NUM_ITEMS, 16, requires_grad=True)
    batch = make_batch([])
    loss = model(rows_for(model, batch, table), batch, StepContext(step=0))
    assert loss.count == 0 and loss.sum.item() == 0
    loss.sum.backward()
    assert table.grad.abs().sum() == 0


def test_dropout_keeps_the_expectation_and_its_share():
    dropout = Dropout(0.5)
    torch.manual_seed(0)
    values = dropout(torch.ones(200_000))
    assert abs(values.mean().item() - 1) < 0.01
    assert abs((values == 0).float().mean().item() - 0.5) < 0.01
    assert torch.equal(dropout.eval()(torch.ones(9)), torch.ones(9))


def test_negatives_depend_on_seed_and_step_only():
    objective = SampledSoftmax.Config(num_negatives=50).build(num_items=1000)
    targets = torch.tensor([1, 2])

    def draw(step, seed, rank):
        return objective.ids(targets, StepContext(step=step, seed=seed, rank=rank, world_size=2))["negative"]

    assert torch.equal(draw(1, 2, 0), draw(1, 2, 1))
    assert not torch.equal(draw(1, 2, 0), draw(2, 2, 0))
    assert not torch.equal(draw(1, 2, 0), draw(1, 3, 0))


def test_the_recipe_widths_build():
    objective = SampledSoftmax.Config().build(num_items=10)
    config = SASRec.Config(width=32, num_blocks=1, num_heads=4, feedforward_width=64)
    model = config.build(num_items=10, max_length=5, item_feature_dim=0, objective=objective)
    assert model.blocks[0].feedforward_input.out_features == 64
