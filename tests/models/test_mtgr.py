"""MTGR: its windows by hand, who sees what bit by bit, and that one pass per user equals one per candidate."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.exposure_windows import ANSWERS, CANDIDATES, NUM_STATIC, VISIBLE, Window
from models.kernels.prefix_attention import age_buckets
from models.layers.group_layer_norm import GroupLayerNorm
from models.mtgr import MTGR
from models.recommender import StepContext
from models.tables import LookedUp

CODES = ("cart", "click", "exposure")
CART, CLICK, SHOW = range(3)
CONTEXT = StepContext(step=0)
NUM_ITEMS = 12


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def log_of_two_users():
    """The first user: page 0 shows 5 and 6 and 5 is clicked at 3 s; page 1 begins in that second, shows 7 and 8, and 8
    is clicked and put in the cart; page 2 shows 9 before the click on 8, which is on another page; on page 3 there is a
    click alone. The second user was shown nothing."""
    events = [
        # item, action, page, second
        (5, SHOW, 0, 1),
        (6, SHOW, 0, 1),
        (5, CLICK, 0, 3),
        (7, SHOW, 1, 3),
        (8, SHOW, 1, 4),
        (9, SHOW, 2, 5),
        (8, CLICK, 1, 6),
        (8, CART, 1, 7),
        (9, CLICK, 2, 8),
        (4, CLICK, 3, 10),
        (5, CLICK, -1, 1),
    ]
    items, action, page, time = (torch.tensor(column) for column in zip(*events, strict=True))
    return SequenceBatch(
        user_ids=torch.tensor([3, 1]),
        items=Jagged.from_lengths(items, torch.tensor([10, 1])),
        features={"action": action.to(torch.int8), "page_id": page.int(), "timestamp_s": time},
    )


def random_log(num_users=4, num_pages=6, seed=0):
    """Pages of three shown items, one of which is clicked a second later, and then put in the cart or not."""
    generator = torch.Generator().manual_seed(seed)
    count = num_users * num_pages
    shown = torch.randint(NUM_ITEMS, (count, 3), generator=generator)
    items = torch.cat((shown, shown[:, :1], shown[:, :1]), dim=1)
    action = torch.tensor([SHOW, SHOW, SHOW, CLICK, CART]).expand(count, 5)
    page = torch.arange(count) % num_pages
    time = 10 * page[:, None] + torch.tensor([0, 0, 0, 1, 2])
    kept = torch.ones(count, 5, dtype=torch.bool)
    kept[:, 4] = shown[:, 0] % 2 == 0
    lengths = kept.sum(1).view(num_users, num_pages).sum(1)
    return SequenceBatch(
        user_ids=torch.arange(num_users),
        items=Jagged.from_lengths(items[kept], lengths),
        features={
            "action": action[kept],
            "page_id": page[:, None].expand(count, 5)[kept],
            "timestamp_s": time[kept],
        },
    )


def make_model(**options):
    torch.manual_seed(0)
    sizes = {"width": 8, "num_blocks": 2, "hidden": 12, "user_rows": 10, "dropout": 0.0}
    model = MTGR.Config(**{**sizes, **options}).build(num_items=NUM_ITEMS, actions=CODES)
    for parameter in model.parameters():
        # Scales of groups and biases of ages that a mistake would show in.
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def looked_up(ids, table=None):
    table = random(NUM_ITEMS, 8) if table is None else table
    return {name: LookedUp(ids=values, rows=table[values]) for name, values in ids.items()}


def test_a_window_knows_answers_and_what_was_taken_before_each_request():
    batch = make_model(window="span").training_batch(log_of_two_users(), CONTEXT)
    parts = batch.supervision
    assert batch.user_ids.tolist() == [3]
    assert parts[CANDIDATES].values.tolist() == [5, 6, 7, 8, 9]
    # Actions are click and cart. The click in the second in which page 1 begins is not before it.
    assert parts[ANSWERS].values.int().tolist() == [[1, 0], [0, 0], [0, 0], [1, 1], [1, 0]]
    assert parts[VISIBLE].values.tolist() == [0, 0, 0, 0, 1]
    # No candidate may know the clicks on 8 and 9: they are not looked at.
    assert batch.items.values.tolist() == [5]
    assert parts[NUM_STATIC].values.tolist() == [0]


def test_what_lies_on_no_page_belongs_to_no_other_user():
    """The second user's clicks on no page are not on the first one's last page."""
    events = [(5, SHOW, 1, 1), (5, CLICK, 1, 2), (6, CLICK, -1, 3), (6, SHOW, 0, 4), (7, SHOW, 0, 4)]
    items, action, page, time = (torch.tensor(column) for column in zip(*events, strict=True))
    batch = SequenceBatch(
        user_ids=torch.tensor([0, 1]),
        items=Jagged.from_lengths(items, torch.tensor([2, 3])),
        features={"action": action.to(torch.int8), "page_id": page.int(), "timestamp_s": time},
    )
    parts = make_model(window="span").training_batch(batch, CONTEXT).supervision
    assert parts[CANDIDATES].values.tolist() == [5, 6, 7]
    assert parts[ANSWERS].values[:, 0].tolist() == [True, False, False]
    assert parts[VISIBLE].values.tolist() == [0, 1, 1]


def test_a_drawn_window_begins_with_a_request_and_what_was_before_is_static():
    model = make_model(window="drawn")
    log = random_log(num_users=40)
    parts = model.training_batch(log, CONTEXT).supervision
    begins, lengths = parts[NUM_STATIC].values, parts[CANDIDATES].lengths
    assert set(begins.tolist()) == set(range(6))
    # Each page has one click.
    assert torch.equal(lengths, 3 * (6 - begins))
    first = parts[VISIBLE].values[parts[CANDIDATES].offsets[:-1]]
    assert torch.equal(first, begins)
    again = model.training_batch(log.select(7, 30), CONTEXT).supervision
    assert torch.equal(again[NUM_STATIC].values, begins[7:30])
    other = model.training_batch(log, StepContext(step=1)).supervision
    assert not torch.equal(other[NUM_STATIC].values, begins)


def changes(model, batch, feature, place):
    """Which candidates' scores change in any bit when one looked-up row does. Shapes: [K] bool."""
    rows = looked_up(model.ids(batch, CONTEXT))
    before = model._score(rows, Window.of_training(batch))
    changed = rows[feature].rows.clone()
    changed[place] = random(8, seed=7)
    after = model._score({**rows, feature: replace(rows[feature], rows=changed)}, Window.of_training(batch))
    return (before != after).any(-1)


@pytest.mark.parametrize("window", ["span", "drawn"])
def test_a_candidate_depends_on_what_was_before_its_request_and_on_itself_alone(window):
    model = make_model(window=window)
    batch = model.training_batch(random_log(num_users=2, num_pages=4), CONTEXT)
    candidates, visible = batch.supervision[CANDIDATES], batch.supervision[VISIBLE].values
    owner, taken = candidates.row_index(), batch.items
    for event in range(batch.num_tokens):
        user, place = taken.row_index()[event], taken.places()[event]
        expected = (owner == user) & (place < visible)
        assert torch.equal(changes(model, batch, "event", event), expected)
    for candidate in range(len(owner)):
        expected = torch.arange(len(owner)) == candidate
        assert torch.equal(changes(model, batch, "candidate", candidate), expected)
    assert torch.equal(changes(model, batch, "user", 1), owner == 1)


def test_without_the_dynamic_mask_a_candidate_sees_what_came_later():
    model = make_model(dynamic_mask=False)
    batch = model.training_batch(random_log(), CONTEXT)
    owner = batch.supervision[CANDIDATES].row_index()
    assert torch.equal(changes(model, batch, "event", batch.num_tokens - 1), owner == 3)


def who_sees_what(batch):
    """Group of every token, and the tokens it sees: of all users the user, what was taken before the window and in it;
    then all candidates."""
    static, visible = (batch.supervision[name] for name in (NUM_STATIC, VISIBLE))
    groups, sees, firsts = [], [], []
    for length, num_static in zip(batch.items.lengths.tolist(), static.values.tolist(), strict=True):
        first, before_window = len(groups), 1 + num_static
        firsts.append(first)
        for place in range(1 + length):
            groups.append(0 if place == 0 else 1 if place < before_window else 2)
            sees.append(list(range(first, first + max(before_window, place + 1))))
    for user, known in zip(visible.row_index().tolist(), visible.values.tolist(), strict=True):
        sees.append([*range(firsts[user], firsts[user] + 1 + known), len(groups)])
        groups.append(3)
    return torch.tensor(groups), sees


def written_out(block, hidden, groups, sees):
    """X + f(norm(V' * U)) with [Q, K, V, U] = SiLU(norm(X) W), head by head; the latest a token sees is of age 1."""

    def group_norm(norm, rows):
        return (
            nn.functional.layer_norm(rows, rows.shape[1:], eps=1e-6) * norm.scale[groups] + norm.shift[groups]
        )

    packed = nn.functional.silu(block.projection(group_norm(block.before, hidden)))
    queries, keys, values, gates = packed.chunk(4, dim=1)
    width, by_age, attended = hidden.shape[1] // block.num_heads, block.bias(), torch.zeros_like(hidden)
    for token, seen in enumerate(sees):
        # A candidate stands behind what it sees, and is of age 1 to itself.
        ages = torch.arange(len(seen), 0, -1)
        ages = torch.where(groups[token] == 3, (ages - 1).clamp(min=1), ages)
        for head in range(block.num_heads):
            part = slice(head * width, (head + 1) * width)
            scores = keys[seen, part] @ queries[token, part] + by_age[head, age_buckets(ages)]
            attended[token, part] = nn.functional.silu(scores) @ values[seen, part] / len(seen)
    return hidden + block.output(group_norm(block.after, attended * gates))


def test_a_block_is_the_formula_of_the_paper_over_what_each_token_sees():
    model, caught = make_model(window="drawn"), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: caught.append((block, inputs[0], output)))
    batch = model.training_batch(random_log(num_users=6), CONTEXT)
    groups, sees = who_sees_what(batch)
    assert set(groups.tolist()) == {0, 1, 2, 3}
    model._score(looked_up(model.ids(batch, CONTEXT)), Window.of_training(batch))
    for block, hidden, found in caught:
        torch.testing.assert_close(found, written_out(block, hidden, groups, sees), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", ["span", "drawn"])
def test_all_candidates_in_one_row_get_the_scores_of_a_row_for_each(window):
    model = make_model(window=window)
    batch = model.training_batch(random_log(), CONTEXT)
    table, together = random(NUM_ITEMS, 8), Window.of_training(batch)
    expected = model._score(looked_up(model.ids(batch, CONTEXT), table), together)
    owner = together.candidates.row_index()
    one_each = torch.ones_like(owner)
    apart = Window(
        context=Jagged.from_lengths(
            torch.cat([together.context.values[together.context.row_index() == user] for user in owner]),
            together.context.lengths[owner],
        ),
        num_static=together.num_static[owner],
        candidates=Jagged.from_lengths(together.candidates.values, one_each),
        visible=together.visible,
    )
    ids = {
        "event": apart.context.values,
        "candidate": apart.candidates.values,
        "user": batch.user_ids[owner],
    }
    torch.testing.assert_close(model._score(looked_up(ids, table), apart), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", ["span", "drawn"])
def test_served_candidates_get_the_scores_of_training(window):
    """Those of a request at which a window begins, or with which a history ends."""
    model = make_model(window=window)
    batch = model.training_batch(random_log(num_users=1), CONTEXT)
    parts = batch.supervision
    known = parts[VISIBLE].values[0 if window == "drawn" else -1]
    wanted = parts[VISIBLE].values == known
    expected = model._score(looked_up(model.ids(batch, CONTEXT)), Window.of_training(batch))[wanted]
    history = SequenceBatch(
        user_ids=batch.user_ids, items=Jagged.from_lengths(batch.items.values[:known], known[None])
    )
    candidates = torch.cat((parts[CANDIDATES].values[wanted], torch.tensor([-1])))[None]
    found = model.logits(looked_up(model.candidate_ids(history, candidates)), history, candidates)
    assert found.shape == (1, 4, 2)
    torch.testing.assert_close(found[0, :3], expected, rtol=1e-4, atol=1e-5)


def test_the_loss_equals_a_loop_over_candidates_and_actions():
    model = make_model()
    batch = model.training_batch(random_log(), CONTEXT)
    rows = looked_up(model.ids(batch, CONTEXT))
    loss = model(rows, batch, CONTEXT)
    probabilities = model._score(rows, Window.of_training(batch)).double().sigmoid().tolist()
    answers = batch.supervision[ANSWERS].values.tolist()
    expected = dict.fromkeys(model.actions, 0.0)
    for chances, answered in zip(probabilities, answers, strict=True):
        for action, chance, was in zip(model.actions, chances, answered, strict=True):
            expected[action] -= torch.tensor(chance if was else 1 - chance).log().item()
    assert loss.count == model.num_targets(batch) == 72
    assert loss.sum.item() == pytest.approx(sum(expected.values()), rel=1e-4)
    assert {name: value.item() for name, value in loss.metrics.items()} == pytest.approx(expected, rel=1e-4)


def test_the_auxiliary_loss_is_added_with_its_weight():
    plain, helped = (make_model(auxiliary_weight=weight, num_negatives=5) for weight in (0.0, 0.3))
    plain.load_state_dict(
        {name: value for name, value in helped.state_dict().items() if "follow" not in name}
    )
    batch = plain.training_batch(random_log(), CONTEXT)
    ids = helped.ids(batch, CONTEXT)
    # Each user knows five clicks, the last of which no candidate does.
    assert ids["taken"].shape == ids["next"].shape == (16,) and ids["negative"].shape == (5,)
    loss = helped(looked_up(ids), batch, CONTEXT)
    expected = (
        plain(looked_up(plain.ids(batch, CONTEXT)), batch, CONTEXT).sum + 0.3 * loss.metrics["auxiliary"]
    )
    torch.testing.assert_close(loss.sum, expected)


def test_a_batch_without_candidates_still_gives_all_weights_a_gradient():
    model = make_model(auxiliary_weight=1.0)
    batch = model.training_batch(log_of_two_users().select(1, 2), CONTEXT)
    assert (batch.num_users, model.num_targets(batch)) == (0, 0)
    loss = model(looked_up(model.ids(batch, CONTEXT)), batch, CONTEXT)
    loss.sum.backward()
    assert loss.count == loss.sum.item() == 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_group_layer_norm_is_a_layer_norm_for_each_group():
    norm, groups = GroupLayerNorm(3, 5), torch.tensor([0, 2, 2, 0, 1])
    nn.init.normal_(norm.scale)
    nn.init.normal_(norm.shift)
    rows = random(5, 5, seed=1)
    ours = norm(rows, nn.functional.one_hot(groups, 3).float())
    for row, group, found in zip(rows, groups, ours, strict=True):
        own = nn.LayerNorm(5, eps=1e-6)
        own.load_state_dict({"weight": norm.scale[group], "bias": norm.shift[group]})
        torch.testing.assert_close(found, own(row))


def test_the_count_of_what_was_taken_before_is_told_to_candidates():
    history = SequenceBatch(
        user_ids=torch.zeros(1, dtype=torch.int64),
        items=Jagged.from_lengths(torch.tensor([4, 4, 2]), torch.tensor([3])),
    )
    model = make_model(cross_features=True)
    table = torch.ones(NUM_ITEMS, 8)
    rows = looked_up(model.candidate_ids(history, torch.tensor([[4, 2, 7, 8]])), table)
    twice, once, never, neither = model.logits(rows, history, torch.tensor([[4, 2, 7, 8]]))[0]
    assert torch.equal(never, neither)
    assert not torch.allclose(twice, once) and not torch.allclose(once, never)


def test_data_without_exposures_or_answers_is_refused():
    with pytest.raises(ConfigError, match=r"mtgr learns from exposures .* but no exposure"):
        MTGR.Config().build(num_items=3, actions=("click",))
    with pytest.raises(ConfigError, match="but no like; build it with --keep-exposures"):
        MTGR.Config(actions=("like",)).build(num_items=3, actions=CODES)
    for given in (("exposure", "click"), ("click", "click")):
        with pytest.raises(ConfigError, match="must be answers to exposures, each once"):
            make_model(actions=given)
    for options, told in (({"hidden": 0}, "hidden 0"), ({"user_rows": -1}, "user-rows -1")):
        with pytest.raises(ConfigError, match=f"must be at least 1, .* got {told}"):
            make_model(**options)
    with pytest.raises(ConfigError, match="multiple of the number of its heads"):
        MTGR.Config(num_heads=5).build(num_items=3, actions=CODES)
