"""Climber-Pilot: multi-item prediction and condition-guided attention, by hand, bit for bit and against plain models."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.climber_pilot import ClimberPilot
from models.multi_item_targets import TIME, VISIBLE, slots_name, targets_name
from models.objectives.full_softmax import FullSoftmax
from models.recommender import StepContext
from models.sasrec import SASRec
from models.tables import LookedUp
from tests.training_cases import NUM_ITEMS, make_batch

MAX_LENGTH, WIDTH, NUM_CONDITIONS = 12, 16, 5
CONTEXT = StepContext(step=3, seed=1)


def build(form, **options):
    torch.manual_seed(5)
    parts = {}
    if options.get("condition_column"):
        parts = {"condition_table": conditions(), "num_conditions": NUM_CONDITIONS}
    objective = FullSoftmax.Config(temperature=0.2).build(num_items=NUM_ITEMS)
    config = form(**{"width": WIDTH, "num_heads": 2, "dropout": 0.0, "init_scale": 0.1, **options})
    return config.build(
        num_items=NUM_ITEMS, max_length=MAX_LENGTH, item_feature_dim=0, objective=objective, **parts
    ).eval()


def pilot(**options):
    return build(ClimberPilot.Config, num_blocks=2, **options)


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


@pytest.mark.parametrize("window_s", [0.0, 500.0, 1000.0, 2500.0])
def test_what_is_learnt_where_is_what_the_definition_says(window_s):
    model = pilot(num_branches=3, time_window_s=window_s)
    batch = model.training_batch(make_users(), CONTEXT)
    found = set()
    for branch in range(3):
        slots, targets = (batch.supervision[name(branch)] for name in (slots_name, targets_name))
        for user, place, target in zip(
            slots.row_index().tolist(), slots.values.tolist(), targets.values.tolist(), strict=True
        ):
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


@pytest.mark.parametrize("options", [{}, {"condition_column": "categories"}])
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
        assert changed or not sees or torch.equal(items, batch.items.values) or options


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
