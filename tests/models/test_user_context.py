"""Tokens of a context: which events they are, from when to when they are known, and what describes them."""

import pytest
import torch

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.kernels.context_attention import NEVER
from models.layers.code_embedding import CodeEmbedding
from models.layers.event_features import EventFeatures, play_time_bucket, played_share_bucket
from models.layers.pathways import ContextTokens, Pathway, TokenOrder, latest, positive_feedback
from models.layers.rotary import rotate
from models.layers.user_context import POSITIVE, ContextConfig, UserContext
from tests.generator_cases import semantic_ids
from tests.pretended_device import PRETENDED, PretendedDevice, no_real_device

ITEMS = Jagged.from_lengths(torch.arange(7), torch.tensor([4, 0, 3]))


def test_the_latest_events_are_known_behind_them_and_forgotten_again():
    since, until = latest(ITEMS, 2)
    assert since.tolist() == [1, 2, 3, 4, 1, 2, 3]
    assert until.tolist() == [3, 4, 5, 6, 3, 4, 5]
    assert latest(ITEMS, None)[1].tolist() == [NEVER] * 7


def test_a_liked_event_is_forgotten_when_enough_others_were_liked():
    liked = torch.tensor([True, False, True, True, True, True, False])
    since, until = positive_feedback(ITEMS, liked, 2)
    assert since.tolist() == [1, NEVER, 3, 4, 1, 2, NEVER]
    assert until[liked].tolist() == [4, NEVER, NEVER, NEVER, NEVER]
    nobody = torch.zeros(7, dtype=torch.bool)
    assert positive_feedback(ITEMS, nobody, 2)[0].tolist() == [NEVER] * 7


def test_pathways_stand_behind_each_other_user_by_user():
    user, first, second = torch.arange(100, 103), torch.arange(7), torch.arange(10, 17)
    order = TokenOrder.build(ITEMS, with_user=True, num_pathways=2)
    expected = [100, 0, 1, 2, 3, 10, 11, 12, 13, 101, 102, 4, 5, 6, 14, 15, 16]
    assert order.arrange([user, first, second]).tolist() == expected
    assert order.kinds.tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 1, 1, 1, 2, 2, 2]
    assert order.places.values.tolist() == [0, 0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 0, 1, 2, 0, 1, 2]
    assert order.places.offsets.tolist() == [0, 9, 10, 17] and order.places.max_length == 9
    spans = (torch.zeros(3), torch.full((3,), NEVER)), latest(ITEMS, 1), latest(ITEMS, None)
    tokens = ContextTokens(
        vectors=order.arrange([user, first, second]),
        places=order.places,
        since=order.arrange([since.long() for since, _ in spans]),
        until=order.arrange([until for _, until in spans]),
    )
    last = tokens.last_ones(ITEMS.lengths)
    assert last.vectors.tolist() == [100, 3, 10, 11, 12, 13, 101, 102, 6, 14, 15, 16]
    assert last.places.lengths.tolist() == [6, 1, 5]


def test_play_times_fall_into_buckets():
    seconds = torch.tensor([float("nan"), 0.0, 1.0, 3.0, 100.0, 1e9])
    assert play_time_bucket(seconds).tolist() == [0, 1, 2, 3, 7, 15]
    durations = torch.tensor([10.0, 10.0, 10.0, 0.0, 200.0, 10.0])
    assert played_share_bucket(seconds, durations).tolist() == [0, 1, 2, 0, 6, 15]


def test_features_stand_side_by_side():
    features = EventFeatures(widths=[2, 3], num_actions=4, play_time=True, feedback_width=5)
    columns = {
        "action": torch.tensor([3]),
        "play_time_s": torch.tensor([3.0]),
        "duration_s": torch.tensor([6.0]),
    }
    seen = features([torch.ones(1, 2), torch.zeros(1, 3)], columns)
    assert features.width == seen.shape[1] == 20
    own = [features.actions.weight[3], features.play_times.weight[3], features.played_shares.weight[6]]
    assert torch.equal(seen[0], torch.cat((torch.ones(2), torch.zeros(3), *own)))


def test_a_pathway_is_two_layers_with_a_leaky_relu_between_them():
    torch.manual_seed(0)
    pathway, features = Pathway(4, 6, 3), torch.randn(5, 4)
    inner = features @ pathway.expand.weight.T + pathway.expand.bias
    inner = torch.where(inner > 0, inner, 0.01 * inner)
    expected = inner @ pathway.project.weight.T + pathway.project.bias
    torch.testing.assert_close(pathway(features), expected)


def test_rotated_vectors_know_their_distance_alone():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 8, generator=generator)
    at = lambda vector, place: rotate(vector, torch.tensor([place]))  # noqa: E731
    near, far = ((at(query, first) * at(key, second)).sum() for first, second in ((5, 3), (105, 103)))
    torch.testing.assert_close(near, far)
    turned = at(torch.tensor([[[1.0, 0.0, 1.0, 0.0]]]), 1)[0, 0]
    expected = torch.tensor([0.5403, 0.8415, 0.99995, 0.0099998])
    torch.testing.assert_close(turned, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(at(query, 0), query)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"item_rows": False, "item_codes": False}, "keep one of item-rows, item-codes and item-features on"),
        ({"positive_length": 3}, "needs both positive-length and positive-actions, got 3"),
        ({"short_length": -1}, "must be 0 or more, got 0, -1 and 0"),
        ({"row_width": 0}, "row-width and feedback-width of a context must be at least 1, got 384, 0 and 16"),
        ({"hidden": -1}, "must be at least 1, got -1, None and 16"),
    ],
)
def test_impossible_contexts_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ContextConfig(**options)


def make_context(config: ContextConfig) -> UserContext:
    return UserContext(
        config,
        width=8,
        dim=8,
        dropout=0.0,
        num_items=97,
        item_feature_dim=0,
        semantic_ids=semantic_ids(),
        actions=("click", "like", "share"),
        init_scale=0.1,
    )


@no_real_device
def test_an_accelerator_is_sent_nothing_to_find_what_was_liked():
    context = make_context(ContextConfig(positive_length=2, positive_actions=("like", "share")))
    actions = torch.tensor([1, 0, 2, 1, 2, 1, 0])
    batch = SequenceBatch(user_ids=torch.arange(3), items=ITEMS, features={"action": actions})
    expected = positive_feedback(ITEMS, actions > 0, 2)
    with PretendedDevice() as device:
        there = batch.to(PRETENDED)
        device.waits.clear()
        found = context.spans(there)[POSITIVE]
        assert not device.waits
        assert all(torch.equal(own.cpu(), right) for own, right in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("option", "column"), [("actions", "action"), ("play_time", "play_time_s"), ("play_time", "duration_s")]
)
def test_a_token_says_of_its_event_what_the_options_ask_for_and_nothing_else(option, column):
    columns = {
        "action": torch.tensor([1, 0, 2, 1, 2, 1, 0]),
        "play_time_s": torch.full((7,), 30.0),
        "duration_s": torch.full((7,), 60.0),
    }
    changed = columns | {column: columns[column].clone()}
    changed[column][2] = 1
    for is_asked_for in (False, True):
        torch.manual_seed(0)
        context = make_context(ContextConfig(item_rows=False, **{option: is_asked_for}))
        codes = CodeEmbedding(semantic_ids().code_sizes, 8)
        before, after = (
            context({}, SequenceBatch(user_ids=torch.arange(3), items=ITEMS, features=these), codes).vectors
            for these in (columns, changed)
        )
        assert torch.nonzero((before != after).any(1))[:, 0].tolist() == [2] * is_asked_for


def test_the_table_of_users_has_as_many_rows_as_asked_for():
    (users,) = make_context(ContextConfig(item_rows=False, user_rows=50)).tables()
    assert (users.name, users.hash_rows, users.rows_are_users) == ("user", 50, True)


def test_a_positive_action_that_the_data_lacks_is_refused():
    config = ContextConfig(positive_length=3, positive_actions=("adored",))
    with pytest.raises(
        ConfigError,
        match=r"model.context.positive-actions must be actions of the data, and adored is none; it has "
        r"click, like, share; name some of those with --model.context.positive-actions",
    ):
        make_context(config)
