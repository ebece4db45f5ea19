"""The reward model: its attention against a loop, its examples by hand, and scores that equal those of training."""

from dataclasses import replace

import pytest
import torch

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.kernels.interest_attention import interest_attention, reference_interest_attention
from models.kernels.length_buckets import bucket_layout, padded_layout
from models.recommender import StepContext
from models.reward_sim import KEY_NUMBER, NUM_VISIBLE, SHOWN, RewardSim
from models.tables import LookedUp

CODES = ("cart", "click", "exposure")
CART, CLICK, SHOW = range(3)
CONTEXT = StepContext(step=0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", [bucket_layout, padded_layout])
def test_interest_attention_equals_the_loop_in_values_and_gradients(layout):
    lengths = torch.tensor([5, 1, 40, 0, 37])
    sequences = Jagged.from_lengths(torch.zeros(83, dtype=torch.int64), lengths)
    is_key = random(83) > 0.3
    row = sequences.row_index()
    before = torch.cat((torch.zeros(1), is_key.cumsum(0))).long()
    first = before[sequences.offsets[row]]
    numbers = torch.where(is_key, before[:-1] - first, -1)
    # A query sees some of the keys that stand before it.
    visible = ((before[:-1] - first) * torch.rand(83, generator=torch.Generator().manual_seed(3))).long()
    tensors = [random(83, 2, 4, seed=seed).requires_grad_() for seed in range(3)]
    slopes = torch.tensor([0.3, 0.05], requires_grad=True)
    leaves = (*tensors, slopes)
    ours = interest_attention(*tensors, numbers, visible, slopes, layout(sequences))
    expected = reference_interest_attention(*tensors, numbers, visible, slopes, sequences)
    torch.testing.assert_close(ours, expected)
    assert (ours[visible == 0] == 0).all()
    weights = random(83, 2, 4, seed=9)
    for own, reference in zip(
        torch.autograd.grad((ours * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [bucket_layout, padded_layout])
def test_where_no_user_has_keys_the_sums_are_zero_and_all_weights_have_gradients(layout):
    sequences = Jagged.from_lengths(torch.zeros(7, dtype=torch.int64), torch.tensor([3, 4]))
    leaves = [random(7, 2, 4).requires_grad_() for _ in range(3)] + [torch.ones(2, requires_grad=True)]
    nothing = torch.zeros(7, dtype=torch.int64)
    found = interest_attention(*leaves[:3], nothing - 1, nothing, leaves[3], layout(sequences))
    assert not found.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(found.sum(), leaves))


def batch_of_two_pages():
    """One user: page 0 shows 5, 6 and 5 is clicked; page 1 shows 5, 7, 8, and 8 is clicked and put in the cart;
    page 2 shows 9. Another user: page 0 shows 5."""
    items = [5, 6, 5, 5, 7, 8, 8, 8, 9, 5]
    action = [SHOW, SHOW, CLICK, SHOW, SHOW, SHOW, CLICK, CART, SHOW, SHOW]
    page = [0, 0, 0, 1, 1, 1, 1, 1, 2, 0]
    return SequenceBatch(
        user_ids=torch.tensor([0, 1]),
        items=Jagged.from_lengths(torch.tensor(items), torch.tensor([9, 1])),
        features={"action": torch.tensor(action, dtype=torch.int8), "page_id": torch.tensor(page).int()},
    )


def test_exposures_know_their_answers_and_see_earlier_pages_only():
    model = RewardSim.Config().build(num_items=10, actions=CODES)
    assert model.actions == ("click", "cart")
    columns = model.training_batch(batch_of_two_pages(), CONTEXT).features
    assert columns[SHOWN].int().tolist() == [1, 1, 0, 1, 1, 1, 0, 0, 1, 1]
    assert columns["answer_click"].int().tolist() == [1, 0, 1, 0, 0, 1, 1, 1, 0, 0]
    assert columns["answer_cart"].int().tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0]
    assert columns[KEY_NUMBER].tolist() == [-1, -1, 0, -1, -1, -1, 1, -1, -1, -1]
    assert columns[NUM_VISIBLE].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2, 0]


def test_a_page_that_goes_on_behind_another_does_not_know_its_own_answers():
    # Page 0 shows 5 and 6, 5 is clicked; page 1 shows 7; page 0 goes on with 8. Another user has pages 1 and 0.
    action, page = [SHOW, SHOW, CLICK, SHOW, SHOW, CLICK, SHOW], [0, 0, 0, 1, 0, 1, 0]
    batch = SequenceBatch(
        user_ids=torch.tensor([0, 1]),
        items=Jagged.from_lengths(torch.tensor([5, 6, 5, 7, 8, 9, 9]), torch.tensor([5, 2])),
        features={"action": torch.tensor(action, dtype=torch.int8), "page_id": torch.tensor(page).int()},
    )
    columns = RewardSim.Config().build(num_items=10, actions=CODES).training_batch(batch, CONTEXT).features
    assert columns[NUM_VISIBLE].tolist() == [0, 0, 0, 1, 0, 0, 1]


def looked_up(table, ids):
    return {name: LookedUp(ids=values, rows=table[values]) for name, values in ids.items()}


def test_given_candidates_get_the_scores_of_training():
    torch.manual_seed(0)
    model = RewardSim.Config(width=8, num_heads=2).build(num_items=10, actions=CODES).eval()
    table = random(10, 8)
    batch = model.training_batch(batch_of_two_pages(), CONTEXT)
    trained = model._score(
        table[batch.items.values], batch.items, batch.features[KEY_NUMBER], batch.features[NUM_VISIBLE]
    )
    history = SequenceBatch(
        user_ids=torch.tensor([0, 1]),
        items=Jagged.from_lengths(torch.tensor([5, 3]), torch.tensor([1, 1])),
    )
    candidates = torch.tensor([[5, 7, 8], [6, -1, 2]])
    found = model.logits(looked_up(table, model.candidate_ids(history, candidates)), history, candidates)
    torch.testing.assert_close(found[0], trained[3:6])
    assert found.shape == (2, 3, 2)


def test_the_loss_counts_exposures_alone():
    torch.manual_seed(0)
    model = RewardSim.Config(width=8, num_heads=2).build(num_items=10, actions=CODES).eval()
    table = random(10, 8).requires_grad_()
    batch = model.training_batch(batch_of_two_pages(), CONTEXT)
    loss = model(looked_up(table, model.ids(batch, CONTEXT)), batch, CONTEXT)
    logits = model._score(
        table[batch.items.values], batch.items, batch.features[KEY_NUMBER], batch.features[NUM_VISIBLE]
    )
    click, cart = (logits[[0, 1, 3, 4, 5, 8, 9], action] for action in range(2))
    clicked, carted = torch.tensor([1.0, 0, 0, 0, 1, 0, 0]), torch.tensor([0.0, 0, 0, 0, 1, 0, 0])
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    expected = entropy(click, clicked, reduction="sum") + entropy(cart, carted, reduction="sum")
    # One pair for the auxiliary loss: 5 was taken, then 8.
    ids = model.ids(batch, CONTEXT)
    assert (ids["taken"].tolist(), ids["next"].tolist()) == ([5], [8])
    unit = table / table.norm(dim=-1, keepdim=True)
    scores = [unit[5] @ unit[item] / 0.1 for item in [8, *(n for n in ids["negative"].tolist() if n != 8)]]
    auxiliary = torch.stack(scores).logsumexp(0) - scores[0]
    torch.testing.assert_close(loss.metrics["auxiliary"], auxiliary.detach())
    torch.testing.assert_close(loss.sum, expected + auxiliary)
    torch.testing.assert_close(loss.metrics["click"], entropy(click, clicked, reduction="sum").detach())
    assert loss.count == 10


def test_users_cost_the_same_together_and_apart():
    torch.manual_seed(0)
    model = RewardSim.Config(width=8, num_heads=2).build(num_items=10, actions=CODES).eval()
    table = random(10, 8)
    one = batch_of_two_pages()
    both = replace(
        one,
        items=Jagged.from_lengths(one.items.values.repeat(2), torch.tensor([9, 1, 9, 1])),
        user_ids=torch.arange(4),
        features={name: column.repeat(2) for name, column in one.features.items()},
    )

    def loss(batch):
        return model(looked_up(table, model.ids(batch, CONTEXT)), batch, CONTEXT).sum

    together = model.training_batch(both, CONTEXT)
    parts = [together.select(0, 1), together.select(1, 4)]
    torch.testing.assert_close(loss(together), sum(loss(part) for part in parts))
    torch.testing.assert_close(loss(together), 2 * loss(model.training_batch(one, CONTEXT)))


def test_data_without_exposures_or_answers_is_refused():
    with pytest.raises(ConfigError, match="but no exposure"):
        RewardSim.Config().build(num_items=3, actions=("click",))
    with pytest.raises(ConfigError, match="but no like"):
        RewardSim.Config(actions=("like",)).build(num_items=3, actions=CODES)
    with pytest.raises(ConfigError, match="but no answers"):
        RewardSim.Config().build(num_items=3, actions=("exposure",))
