"""OneRec: published sizes, sessions as targets, what each target knows, bad input."""

from dataclasses import replace

import pytest
import torch

from benchmarks.setting.flops import build_on_meta
from cluster.errors import ConfigError, DataError
from data_streams.jagged import Jagged
from launch.recipes import onerec
from models.known_tokens import COUNTS, KNOWN, with_known_tokens
from models.layers.user_context import ContextConfig
from models.lifelong_history import LifelongConfig
from models.onerec import MOST_STEPS_WITHOUT_SESSION, OneRec, append_to_rows
from models.predicted_events import PREDICTED, with_newest
from models.recommender import StepContext
from models.session_targets import SESSION, SessionConfig, with_sessions
from tests.generator_cases import GENERATORS, MAX_LENGTH, NUM_ITEMS, lookup_ids, semantic_ids
from tests.training_cases import make_batch

MILLIONS = {"0.121b": 121.8, "0.935b": 927.2, "2.633b": 2664.2}
"""Of encoder, decoder and queries of the lifelong pathway, without vectors of codes and scores of codes."""


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def published(size: str) -> OneRec:
    return build_on_meta(replace(onerec.recipe().model, size=size), code_sizes=(8192,) * 3, max_length=2000)


@pytest.mark.parametrize("size", MILLIONS)
def test_published_sizes_have_about_the_published_numbers_of_parameters(size):
    model = published(size)
    own = count(model.encoder) + count(model.decoder) + count(model.qformer)
    assert own / 1e6 == pytest.approx(MILLIONS[size], abs=0.05)
    assert own / 1e9 == pytest.approx(float(size.removesuffix("b")), rel=0.015)


def test_the_smallest_published_size_is_mostly_vectors_that_are_not_published():
    model = published("0.015b")
    width, codes = 128, 3 * 8192
    assert count(model.encoder) == 2 * (10 * width**2 + 2 * width) + width
    assert count(model.decoder) == 2 * (14 * width**2 + 3 * width)
    assert count(model.codes) + count(model.heads) == 2 * codes * width


def build(config: OneRec.Config, actions: tuple[str, ...] = ()) -> OneRec:
    torch.manual_seed(0)
    return config.build(
        num_items=NUM_ITEMS,
        max_length=MAX_LENGTH,
        item_feature_dim=0,
        semantic_ids=semantic_ids(),
        actions=actions,
    )


def session_batch():
    """Of the first user, the items 1 to 9 in three sessions: (1, 2), (3, 4, 5, 6), (7, 8, 9); of the second one."""
    times = [0, 10, 1000, 1010, 1020, 1030, 2000, 2010, 2020]
    batch = make_batch([torch.arange(1, 10), torch.arange(20, 24)])
    column = lambda first, second, part: torch.tensor(first[part] + second[part])  # noqa: E731
    plays, others = [9.0, 9.0, 9.0, 9.0, 1.0, 9.0, 9.0, 9.0, 9.0], [9.0] * 4
    actions = [0, 0, 0, 0, 0, 0, 0, 1, 0]
    parts = {
        "timestamp_s": (times, [0, 10, 20, 30]),
        "play_time_s": (plays, others),
        "action": (actions, [0] * 4),
    }
    known, behind = slice(0, -1), slice(1, None)
    return replace(
        batch,
        features={name: column(*pair, known) for name, pair in parts.items()},
        target_features={name: column(*pair, behind) for name, pair in parts.items()},
    )


@pytest.mark.parametrize(
    ("options", "count", "expected"),
    [
        ({}, None, {1: [3, 4, 5], 5: [7, 8, 9]}),
        ({}, 1, {5: [7, 8, 9]}),
        ({"items": 4}, None, {1: [3, 4, 5, 6]}),
        ({"watched_s": 5.0}, None, {1: [3, 4, 5], 5: [7, 8, 9]}),
        ({"watched_s": 5.0, "items": 4}, None, {}),
        ({"play_s": 28.0}, None, {1: [3, 4, 5]}),
        ({"actions": ("like",)}, None, {5: [7, 8, 9]}),
    ],
)
def test_sessions_that_are_worth_it_are_targets(options, count, expected):
    config = SessionConfig(**({"items": 3, "gap_s": 100.0} | options))
    chosen = with_sessions(session_batch(), config, action_codes=[1], count=count).supervision
    assert chosen[PREDICTED].values.tolist() == list(expected)
    assert chosen[SESSION].values.tolist() == list(expected.values())
    assert chosen[SESSION].lengths.tolist() == [len(expected), 0]


def test_play_times_that_are_not_known_take_nothing_from_a_session():
    batch = session_batch()
    known = batch.target_features["play_time_s"]
    columns = {**batch.target_features, "play_time_s": torch.where(known == 1, -1.0, known)}
    config = SessionConfig(items=3, gap_s=100.0, play_s=27.0)
    chosen = with_sessions(replace(batch, target_features=columns), config, action_codes=[], count=None)
    # 9, 9 and 9 seconds and an item of which nothing is known; 9, 9 and 9 seconds.
    assert chosen.supervision[SESSION].values.tolist() == [[3, 4, 5], [7, 8, 9]]


def test_a_session_is_predicted_code_by_code_from_what_comes_before_it():
    config = replace(GENERATORS["onerec"], session=SessionConfig(items=3, gap_s=100.0))
    assert config.event_columns == ("timestamp_s",)
    model, context = build(config).eval(), StepContext(step=0)
    batch = model.training_batch(session_batch(), context)
    loss = model(lookup_ids(model, model.ids(batch, context)), batch, context)
    assert model.num_targets(batch) == loss.count == 6
    # What comes later in a session does not change what was said of its first item.
    prompts = make_batch([torch.arange(1, 4), torch.arange(1, 8)])
    prompts = replace(prompts, user_ids=torch.zeros(2, dtype=torch.int64))
    rows = lookup_ids(model, model.prompt_ids(prompts))
    paths = semantic_ids().codes[torch.tensor([3, 7])][:, None]
    first = -model.log_probabilities(rows, prompts, paths).sum()
    shorter = replace(config, session=SessionConfig(items=2, gap_s=100.0))
    other = build(shorter).eval()
    weights = {name: tensor for name, tensor in model.state_dict().items() if "later_items" not in name}
    other.load_state_dict(weights, strict=False)
    with torch.no_grad():
        other.later_items.weight.copy_(model.later_items.weight[:1])
    chosen = other.training_batch(session_batch(), context)
    two = other(lookup_ids(other, other.ids(chosen, context)), chosen, context).sum
    assert 0 < first < two < loss.sum


def test_every_code_of_a_session_is_told_from_the_codes_before_it():
    model = build(replace(GENERATORS["onerec"], session=SessionConfig(items=2, gap_s=100.0))).eval()
    context, caught = StepContext(step=0), []
    model.decoder.register_forward_hook(lambda _, inputs, output: caught.append(output))
    batch, codes = model.training_batch(session_batch(), context), semantic_ids().codes
    rows, sessions = lookup_ids(model, model.ids(batch, context)), batch.supervision[SESSION]
    expected = 0
    loss = model(rows, batch, context)
    for item in range(2):
        for level, wanted in enumerate(codes[sessions.values[:, item]].unbind(1)):
            logits = model.scores(level, caught[0][:, 3 * item + level])
            expected = expected + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    torch.testing.assert_close(loss.sum, expected)
    # The last code of an item is read where the next item begins, and that of the last item nowhere.
    for item, begin in ((0, 3), (1, 6)):
        others = sessions.values.clone()
        for place, one in enumerate(codes[others[:, item]]):
            others[place, item] = torch.nonzero((codes[:, :2] == one[:2]).all(1) & (codes[:, 2] != one[2]))[
                0, 0
            ]
        changed = {**batch.supervision, SESSION: sessions.with_values(others)}
        model(rows, replace(batch, supervision=changed), context)
        same = (caught[-1] == caught[0]).all(-1)
        assert same[:, :begin].all() and not same[:, begin:].any()


def test_data_without_sessions_is_refused():
    model = build(replace(GENERATORS["onerec"], session=SessionConfig(items=5, gap_s=100.0)))
    batch, context = session_batch(), StepContext(step=0)
    for _ in range(MOST_STEPS_WITHOUT_SESSION - 1):
        model.training_batch(batch, context)
    with pytest.raises(DataError, match="sessions of at least 5 events that pass the filter, and 50 batches"):
        model.training_batch(batch, context)


def test_every_target_knows_the_tokens_of_its_user_that_are_there_by_then():
    batch = with_newest(make_batch([torch.arange(4), torch.arange(3)]), 2)
    tokens = Jagged.from_lengths(torch.zeros(5), torch.tensor([3, 2]))
    since, until = torch.tensor([0, 2, 3, 1, 2]), torch.tensor([9, 3, 9, 9, 9])
    known = with_known_tokens(batch, tokens, since, until).supervision
    # Targets at positions 2 and 3 of the first user, 1 and 2 of the second.
    assert known[COUNTS].values.tolist() == [2, 2, 1, 2]
    assert known[KNOWN].values.tolist() == [0, 1, 0, 2, 0, 0, 1]
    assert known[KNOWN].lengths.tolist() == [4, 3]


def test_the_encoder_counts_events_back_from_each_target():
    model = build(replace(GENERATORS["onerec"], context=ContextConfig(hidden=24), targets_per_user=None))
    ages, context = [], StepContext(step=0)
    model.ages.register_forward_hook(lambda _, inputs, __: ages.append(inputs[0].tolist()))
    batch = model.training_batch(make_batch([torch.arange(4)]), context)
    model(lookup_ids(model, model.ids(batch, context)), batch, context)
    assert ages == [[1, 2, 1, 3, 2, 1]]


def test_queries_stand_behind_the_tokens_of_their_target():
    rows = Jagged.from_lengths(torch.zeros(3), torch.tensor([2, 0, 1]))
    joined, longer = append_to_rows(torch.arange(3.0)[:, None], rows, torch.arange(10.0, 16.0).view(3, 2, 1))
    assert joined[:, 0].tolist() == [0, 1, 10, 11, 12, 13, 2, 14, 15]
    assert longer.lengths.tolist() == [4, 2, 3] and longer.max_length == 4


def test_clustered_histories_reach_the_model_in_training_and_in_search():
    lifelong = LifelongConfig(num_queries=3, num_blocks=1, hidden=32, cluster_events=4)
    model = build(replace(GENERATORS["onerec, lifelong"], lifelong=lifelong, targets_per_user=1)).eval()
    users, context = [torch.arange(11), torch.arange(50, 53)], StepContext(step=0)
    batch = model.training_batch(make_batch(users), context)
    loss = model(lookup_ids(model, model.ids(batch, context)), batch, context)
    prompts = make_batch(users)
    paths = semantic_ids().codes[torch.tensor([10, 52])][:, None]
    rows = lookup_ids(model, model.prompt_ids(prompts))
    torch.testing.assert_close(loss.sum, -model.log_probabilities(rows, prompts, paths).sum())
    whole = build(replace(model.config, lifelong=replace(lifelong, cluster_events=0))).eval()
    assert not torch.allclose(loss.sum, -whole.log_probabilities(rows, prompts, paths).sum())


def test_every_target_reads_of_a_long_history_what_is_read_in_search():
    lifelong = LifelongConfig(num_queries=3, num_blocks=1, hidden=32, max_events=2)
    config = replace(GENERATORS["onerec, lifelong"], lifelong=lifelong, targets_per_user=None)
    model, items, context = build(config).eval(), torch.arange(9), StepContext(step=0)
    batch = model.training_batch(make_batch([items]), context)
    loss, found = model(lookup_ids(model, model.ids(batch, context)), batch, context), []
    for known in range(1, 9):
        prompt, path = make_batch([items[: known + 1]]), semantic_ids().codes[items[known]][None, None]
        rows = lookup_ids(model, model.prompt_ids(prompt))
        found.append(model.log_probabilities(rows, prompt, path).sum())
    torch.testing.assert_close(loss.sum, -torch.stack(found).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "must be a multiple of twice model.num-heads, got 128 and 3"),
        ({"num_encoder_blocks": 0}, "must be at least 1, got 0 and 2"),
        ({"targets_per_user": 0}, "must be at least 1, got 0"),
    ],
)
def test_impossible_shapes_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        OneRec.Config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"items": 0}, "need at least 1 item, and seconds of 0 or more, got 0 items"),
        ({"watched_s": 3.0}, "the filter of sessions needs sessions; set session.items to 2 or more"),
    ],
)
def test_impossible_sessions_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SessionConfig(**options)


def test_an_interaction_that_the_data_lacks_is_refused():
    config = OneRec.Config(session=SessionConfig(items=5, actions=("adored",)), context=ContextConfig())
    with pytest.raises(
        ConfigError, match=r"session.actions must be actions of the data, and adored is none; it has click"
    ):
        build(config, actions=("click",))
