"""Climber-Pilot: multi-item prediction and condition-guided attention, by hand, bit for bit, against plain models."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError
from data_streams.configuration import DataConfig
from data_streams.stream import open_data
from models.climber_pilot import ClimberPilot
from models.kernels.length_buckets import bucket_layout
from models.kernels.masked_attention import prefix_masks, reference_masked_attention
from models.multi_item_targets import OFFERED, TIME, VISIBLE, WANTED, slots_name, targets_name
from models.objectives.full_softmax import FullSoftmax
from models.recommender import StepContext
from models.sasrec import SASRec
from models.tables import LookedUp
from tests.data_streams.tiny_data import make_chunk, write_data_set
from tests.training_cases import NUM_ITEMS, make_batch

MAX_LENGTH, WIDTH, NUM_CONDITIONS = 12, 16, 5
CONTEXT = StepContext(step=3, seed=1)


def build(form, **options):
    torch.manual_seed(5)
    parts = {}
    if options.get("condition_column"):
        parts = {"condition_table": conditions(), "condition_names": tuple(map(str, range(NUM_CONDITIONS)))}
    objective = FullSoftmax.Config(temperature=0.2).build(num_items=NUM_ITEMS)
    config = form(**{"width": WIDTH, "num_heads": 2, "dropout": 0.0, "init_scale": 0.1, **options})
    return config.build(
        num_items=NUM_ITEMS, max_length=MAX_LENGTH, item_feature_dim=0, objective=objective, **parts
    ).eval()


def pilot(**options):
    return build(ClimberPilot.Config, **{"num_blocks": 2, **options})


def conditions():
    """Every item meets condition 0, item i also 1 + i % 3, but for item 7; nothing meets condition 4."""
    table = np.stack(
        [np.zeros(NUM_ITEMS, dtype=np.int32), 1 + np.arange(NUM_ITEMS, dtype=np.int32) % 3], axis=1
    )
    table[7, 1] = -1
    return table


def make_users(lengths=(1, 12, 5, 5, 7, 2), gap_s=1000):
    generator = torch.Generator().manual_seed(4)
    sequences = [torch.randint(NUM_ITEMS, (length + 1,), generator=generator) for length in lengths]
    # An item that meets but one condition, so that its row of conditions is filled up.
    sequences[-1][0] = 7
    batch = make_batch(sequences)
    times = [gap_s * torch.randint(0, 3, (length + 1,), generator=generator).cumsum(0) for length in lengths]
    return replace(
        batch,
        features={TIME: torch.cat([time[:-1] for time in times])},
        target_features={TIME: torch.cat([time[1:] for time in times])},
    )


def make_table():
    return torch.randn(NUM_ITEMS, WIDTH, generator=torch.Generator().manual_seed(0))


def rows_of(ids):
    return {name: LookedUp(ids=values, rows=make_table()[values]) for name, values in ids.items()}


def loss(model, batch):
    batch = model.training_batch(batch, CONTEXT)
    result = model(rows_of(model.ids(batch, CONTEXT)), batch, CONTEXT)
    assert result.count == model.num_targets(batch)
    return result


def naive_targets(batch, window_s, branches):
    """(user, place of the state that is read, target, branch), written as the definition says."""
    found = set()
    for user in range(batch.num_users):
        events = slice(batch.items.offsets[user], batch.items.offsets[user + 1])
        times, anchors = batch.features[TIME][events].tolist(), batch.target_features[TIME][events].tolist()
        targets = batch.targets[events].tolist()
        for place, anchor in enumerate(anchors):
            old = [j for j in range(place + 1) if not anchor - window_s <= times[j] <= anchor]
            for branch in range(branches):
                if old and place + branch < len(targets):
                    found.add((user, place, old[-1], targets[place + branch], branch))
    return found


@pytest.mark.parametrize("window_s", [0.0, 500.0, 1000.0, 2500.0, 1e30, float("inf")])
def test_what_is_learnt_where_is_what_the_definition_says(window_s):
    model = pilot(num_branches=3, time_window_s=window_s)
    batch = model.training_batch(make_users(), CONTEXT)
    found = set()
    for branch in range(3):
        slots, targets = (batch.supervision[name(branch)] for name in (slots_name, targets_name))
        columns = (slots.row_index().tolist(), slots.values.tolist(), targets.values.tolist())
        for user, place, target in zip(*columns, strict=True):
            visible = int(batch.features[VISIBLE][batch.items.offsets[user] + place])
            found.add((user, place, visible - 1, target, branch))
    assert found == naive_targets(batch, window_s, 3)


def test_one_branch_without_a_window_is_next_item_training_of_the_plain_model():
    model = pilot(num_branches=1, time_window_s=None, position_bias=False)
    plain = build(SASRec.Config, num_blocks=3)
    weights = {name.replace("blocks.2", "branches.0"): values for name, values in plain.state_dict().items()}
    for name in ("weight", "bias"):
        weights[f"branches.0.final_norm.{name}"] = weights.pop(f"final_norm.{name}")
    model.load_state_dict(weights)
    batch = make_users()
    assert model.config.event_columns == ()
    ours, theirs = loss(model, batch), loss(plain, batch)
    assert ours.count == theirs.count
    torch.testing.assert_close(ours.sum, theirs.sum, rtol=1e-6, atol=1e-5)


def test_one_branch_without_a_window_equals_the_serving_path():
    model, batch = pilot(num_branches=1, time_window_s=None), make_users()
    hidden = model.encode(rows_of(model.query_ids(batch))["history"], batch)
    ids = rows_of(model.ids(model.training_batch(batch, CONTEXT), CONTEXT))
    vectors = {"vocabulary": model.item_vectors(ids["vocabulary"])}
    expected = model.objective(
        model.objective.queries(hidden),
        batch.targets,
        vectors,
        {"vocabulary": ids["vocabulary"].ids},
        CONTEXT,
    )
    torch.testing.assert_close(loss(model, batch).sum, expected.sum, rtol=1e-6, atol=1e-5)


def states(model, batch):
    """The state of each (user, place, branch) that is learnt."""
    batch = model.training_batch(batch, CONTEXT)
    caught = []
    model.objective.queries = lambda found: caught.append(found) or found
    model(rows_of(model.ids(batch, CONTEXT)), batch, CONTEXT)
    slots = [batch.supervision[slots_name(branch)] for branch in range(model.config.num_branches)]
    keys = [
        (user, place, branch)
        for branch, jagged in enumerate(slots)
        for user, place in zip(jagged.row_index().tolist(), jagged.values.tolist(), strict=True)
    ]
    return dict(zip(keys, caught[0], strict=True)), batch


@pytest.mark.parametrize("options", [{}, {"mask_backbone": False}, {"condition_column": "categories"}])
def test_no_output_depends_on_an_item_that_its_mask_hides(options):
    model, users, window_s = pilot(time_window_s=1000.0, **options), make_users((12, 9)), 1000
    before, batch = states(model, users)
    for place in range(2, 12):
        items = batch.items.values.clone()
        # Another item that meets the same conditions: which events match is told by the table, not by the item.
        items[place] = (
            (items[place] + 3) % 90 if items[place] % 3 == (items[place] + 3) % 90 % 3 else items[place]
        )
        after, _ = states(model, replace(users, items=users.items.with_values(items)))
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        anchors, time = users.target_features[TIME], int(users.features[TIME][place])
        sees = {key for key in before if key[0] == 0 and time < int(anchors[key[1]]) - window_s}
        assert changed <= sees
        assert changed or not sees or torch.equal(items, batch.items.values) or "condition_column" in options


def test_the_bias_of_two_events_is_that_of_their_distance_also_for_a_state_read_earlier():
    model, sequences, read = pilot(), make_users((5,)).items, torch.tensor([0, 0, 1, 1, 3])
    hidden, layout, places = torch.randn(5, WIDTH), bucket_layout(sequences), torch.arange(5)
    block, branch, masks = model.blocks[0], model.branches[0], prefix_masks(places + 1, layout)
    weights = [block.distances.weight[place - places[: place + 1]].T for place in range(5)]
    attended = reference_masked_attention(
        *block.project(block.attention_norm(hidden)), [range(place + 1) for place in range(5)], bias=weights
    )
    torch.testing.assert_close(block(hidden, layout, masks), block.finish(hidden, attended))
    earlier = branch(hidden, layout, prefix_masks(read + 1, layout), read=read, sequences=sequences)
    torch.testing.assert_close(earlier, branch(hidden, layout, masks)[read])


def test_serving_sees_the_whole_history():
    model, users = pilot(), make_users((6,))
    before = model.query(rows_of(model.query_ids(users)), users)
    items = users.items.values.clone()
    for place in range(6):
        other = items.clone()
        other[place] = (other[place] + 1) % NUM_ITEMS
        changed = replace(users, items=users.items.with_values(other))
        assert not torch.allclose(before, model.query(rows_of(model.query_ids(changed)), changed))


def test_packed_users_equal_users_one_by_one():
    for options in ({}, {"condition_column": "categories"}):
        model, batch = pilot(**options), make_users()
        together = loss(model, batch)
        alone = [loss(model, batch.select(user, user + 1)) for user in range(batch.num_users)]
        assert together.count == sum(part.count for part in alone)
        torch.testing.assert_close(together.sum, sum(part.sum for part in alone), rtol=1e-5, atol=1e-4)


def test_micro_batches_hold_what_the_whole_batch_learns():
    model, users = pilot(), make_users()
    whole = model.training_batch(users, CONTEXT)
    parts = [whole.select(user, user + 1) for user in range(whole.num_users)]
    assert sum(model.num_targets(part) for part in parts) == model.num_targets(whole)
    assert (
        torch.cat([part.supervision["targets_0"].values for part in parts])
        .sort()
        .values.equal(whole.supervision["targets_0"].values.sort().values)
    )


def conditioned(model, users, wanted):
    """Training batch in which every target asks for the same condition."""
    batch = model.training_batch(users, CONTEXT)
    return replace(
        batch, features={**batch.features, WANTED: torch.full_like(batch.features[WANTED], wanted)}
    )


def test_a_condition_that_all_items_meet_equals_no_condition():
    users = make_users()
    model = pilot(condition_column="categories", condition_token=False)
    plain = pilot()
    plain.load_state_dict(model.state_dict())
    # In training: the next item at each branch, with and without the mask.
    batch = conditioned(model, users, wanted=0)
    masked = model(rows_of(model.ids(batch, CONTEXT)), batch, CONTEXT)
    model.config = replace(model.config, condition_by="embedding")
    assert torch.equal(masked.sum, model(rows_of(model.ids(batch, CONTEXT)), batch, CONTEXT).sum)
    model.config = replace(model.config, condition_by="attention")
    rows = rows_of(model.query_ids(users))
    queries = model.conditional_queries(
        rows, model.with_conditions(users), torch.zeros(6, 1, dtype=torch.int64)
    )
    torch.testing.assert_close(queries[:, 0], plain.query(rows, users), rtol=1e-5, atol=1e-5)


def test_a_condition_that_nothing_in_the_history_meets_falls_back_to_all_of_it():
    users = make_users()
    model = pilot(condition_column="categories", condition_token=False)
    rows, batch = rows_of(model.query_ids(users)), model.with_conditions(users)
    unmet, met, none = (
        model.conditional_queries(rows, batch, torch.full((6, 1), wanted))[:, 0] for wanted in (4, 0, -1)
    )
    assert torch.equal(unmet, met) and torch.equal(none, met)


def test_conditions_asked_together_equal_conditions_one_by_one_and_differ():
    users, wanted = make_users(), torch.arange(NUM_CONDITIONS).expand(6, -1)
    model = pilot(condition_column="categories")
    rows, batch = rows_of(model.query_ids(users)), model.with_conditions(users)
    together = model.conditional_queries(rows, batch, wanted)
    for place in range(NUM_CONDITIONS):
        alone = model.conditional_queries(rows, batch, wanted[:, place : place + 1])
        torch.testing.assert_close(together[:, place], alone[:, 0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[:, 1], together[:, 2])


def test_the_state_under_a_condition_depends_on_matching_items_and_the_last_one_only():
    users = make_users((9,))
    model = pilot(condition_column="categories", num_blocks=0)
    matching = users.items.values % 3 == 1
    assert 0 < int(matching[:-1].sum()) < 8
    wanted = torch.tensor([[2]])
    before = model.conditional_queries(rows_of(model.query_ids(users)), model.with_conditions(users), wanted)
    for place in range(8):
        items = users.items.values.clone()
        items[place] = (items[place] + 3) % 90 if items[place] < 87 else items[place] - 3
        changed = replace(users, items=users.items.with_values(items))
        after = model.conditional_queries(
            rows_of(model.query_ids(changed)), model.with_conditions(changed), wanted
        )
        assert torch.equal(before, after) != bool(matching[place])


def test_training_under_conditions_is_serving_under_them():
    """Without a window the first branch at the last event is what `conditional_queries` computes."""
    users = make_users()
    model = pilot(condition_column="categories", time_window_s=None)
    for wanted in (0, 2, 4):
        batch, caught = conditioned(model, users, wanted), []
        model.objective.queries = lambda found, caught=caught: caught.append(found) or found
        model(rows_of(model.ids(batch, CONTEXT)), batch, CONTEXT)
        slots = batch.supervision[slots_name(0)]
        last = slots.values == (batch.items.lengths - 1)[slots.row_index()]
        served = model.conditional_queries(rows_of(model.query_ids(users)), batch, torch.full((6, 1), wanted))
        torch.testing.assert_close(caught[0][: len(last)][last], served[:, 0], rtol=1e-4, atol=1e-5)


def test_the_branches_under_conditions_learn_the_next_item_from_shorter_sequences():
    model = pilot(condition_column="categories", time_window_s=None, num_branches=3)
    batch = model.training_batch(make_users((4,)), CONTEXT)
    assert [batch.supervision[slots_name(branch)].values.tolist() for branch in range(3)] == [
        [0, 1, 2, 3],
        [1, 2, 3],
        [2, 3],
    ]
    for branch in range(3):
        targets = batch.supervision[targets_name(branch)].values
        assert targets.equal(batch.targets[branch:])
    wanted, own = batch.features[WANTED], conditions()[batch.targets.numpy()]
    assert all(int(one) in row for one, row in zip(wanted, own, strict=True))
    assert batch.features[OFFERED].equal(torch.from_numpy(conditions()[batch.items.values.numpy()]).long())


def test_a_window_hides_from_a_shorter_sequence_only_what_lies_in_it():
    """S_{n-k+1} under the time mask of its target: events that both take away are not taken away twice."""
    model = pilot(condition_column="categories", time_window_s=900.0, num_branches=2).eval()
    users = make_users((6,))
    times = torch.tensor([0, 1000, 2000, 3000, 4000, 4100, 4200])
    users.features[TIME], users.target_features[TIME] = times[:-1], times[1:]
    batch = model.training_batch(users, CONTEXT)
    seen = []
    model._branch = lambda branch, hidden, batch, layout, visible: seen.append(visible.tolist()) or hidden
    model(rows_of(model.ids(batch, CONTEXT)), batch, CONTEXT)
    assert seen == [[1, 2, 3, 4, 4, 4], [0, 1, 2, 3, 4, 4]]
    assert [batch.supervision[slots_name(branch)].values.tolist() for branch in range(2)] == [
        [0, 1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5],
    ]


def test_the_drawn_conditions_do_not_depend_on_the_users_beside():
    model, users = pilot(condition_column="categories"), make_users()
    together = model.training_batch(users, CONTEXT).features[WANTED]
    alone = [
        model.training_batch(users.select(user, user + 1), CONTEXT).features[WANTED] for user in range(6)
    ]
    assert together.equal(torch.cat(alone))
    assert not together.equal(model.training_batch(users, StepContext(step=4, seed=1)).features[WANTED])


def test_a_condition_embedding_changes_the_state_without_a_mask():
    users, wanted = make_users(), torch.tensor([[1, 2]]).expand(6, -1)
    model = pilot(condition_column="categories", condition_by="embedding")
    batch = model.with_conditions(users)
    first = model.conditional_queries(rows_of(model.query_ids(users)), batch, wanted)
    assert not torch.allclose(first[:, 0], first[:, 1])
    with torch.no_grad():
        model.condition_tokens.weight.zero_()
    same = model.conditional_queries(rows_of(model.query_ids(users)), batch, wanted)
    assert torch.equal(same[:, 0], same[:, 1])


@pytest.mark.parametrize("options", [{}, {"condition_column": "categories"}, {"time_window_s": None}])
def test_a_step_of_no_users_has_no_loss_but_a_gradient_path(options):
    model, table = pilot(**options), make_table().requires_grad_()
    batch = model.training_batch(make_users((3,)).select(0, 0), CONTEXT)
    rows = {name: LookedUp(ids=ids, rows=table[ids]) for name, ids in model.ids(batch, CONTEXT).items()}
    result = model(rows, batch, CONTEXT)
    result.sum.backward()
    assert result.count == 0 and result.sum.item() == 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_options_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"num-branches must be at least 1, got 0"):
        pilot(num_branches=0)
    with pytest.raises(ConfigError, match=r"time-window-s must be at least 0, or None, got -1.0"):
        pilot(time_window_s=-1.0)
    config = ClimberPilot.Config(condition_column="categories")
    with pytest.raises(ConfigError, match=r"condition-column categories needs the conditions of all items"):
        config.build(num_items=3, max_length=3, item_feature_dim=0, objective=pilot().objective)


def test_a_time_window_is_refused_where_events_have_no_times(tmp_path):
    chunk = make_chunk([6] * 20)
    del chunk.columns["timestamp_s"]
    write_data_set(tmp_path, chunk)
    columns = ClimberPilot.Config().event_columns
    assert columns == (TIME,)
    with pytest.raises(ConfigError, match=r"the model needs the event columns timestamp_s"):
        open_data(DataConfig(path=str(tmp_path), columns=columns))
    open_data(DataConfig(path=str(tmp_path), columns=ClimberPilot.Config(time_window_s=None).event_columns))
