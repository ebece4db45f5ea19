"""Rewards against numbers worked out by hand."""

import asyncio
import sys
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from cluster.errors import ConfigError, DataError
from cluster.plugins import plugin_config, plugin_files
from data_streams.build import build
from data_streams.build_config import BuildConfig
from data_streams.item_table import ItemTable
from data_streams.semantic_ids import SemanticIdTable
from data_streams.sources.events import EventsSource
from data_streams.sources.world import WorldSource
from rl.item_vectors import UnitVectors, last_items, relevance
from rl.rewards import RewardOptions, RewardSetting
from rl.rewards.diversity import Diversity
from rl.rewards.duration import Duration
from rl.rewards.hit import Hit
from rl.rewards.hybrid import Hybrid, calibrated
from rl.rewards.illegal_code import IllegalCode
from rl.rewards.legality import Legality
from rl.rewards.popularity import Popularity
from rl.rewards.preference import Preference
from rl.rewards.process import Process
from rl.rewards.python_function import PythonFunction
from rl.rewards.rank import Rank
from rl.rewards.relevance import Relevance, find_threshold
from tests.rl.groups import group
from trainer.baselines import TrainingEvents

NOWHERE = RewardSetting(data_path="")
VECTORS = np.array([[1, 0], [0, 2], [3, 3], [-1, 0]], dtype=np.float32)


def score(function, *groups):
    return asyncio.run(function.score(groups))


def weights(size):
    raw = 1 / np.log2(np.arange(size) + 2)
    return raw / raw.sum()


async def twice_the_item(groups):
    return [2.0 * group.items for group in groups]


def one_for_all(groups):
    return [np.ones(group.size) for group in groups]


@pytest.mark.parametrize("name", plugin_files("rl.rewards"))
def test_every_reward_has_options(name):
    options = plugin_config("rl.rewards", name)
    function = getattr(sys.modules[options.__module__], options.__qualname__.partition(".")[0])
    assert isinstance(options(), RewardOptions) and options().rewards_codes is function.of_codes


def test_a_hit_is_an_observed_positive():
    (found,) = score(Hit.Config().build(NOWHERE), group([4, -1, 9, 4], positives=[9, 5]))
    assert found.values.tolist() == [0, 0, 1, 0] and found.mask.all()
    (nothing,) = score(Hit.Config().build(NOWHERE), group([-1, 4], positives=[]))
    assert nothing.values.tolist() == [0, 0]


def test_an_item_that_shares_the_path_of_a_positive_is_a_hit_but_was_not_watched():
    watched = {"play_time_s": np.array([30.0]), "duration_s": np.array([60.0])}
    # Items 4 and 9 have one path; drawn was 4, and taken 9.
    shared = replace(
        group([4, 9, 7], positives=[9], history=[1], history_features=watched, positive_features=watched),
        paths=np.array([[0, 1], [0, 1], [0, 2]]),
        positive_paths=np.array([[0, 1]]),
    )
    assert score(Hit.Config().build(NOWHERE), shared)[0].values.tolist() == [1, 1, 0]
    assert score(Rank.Config().build(NOWHERE), shared)[0].values.tolist()[:2] == [0, 0]
    assert score(Duration.Config().build(NOWHERE), shared)[0].mask.tolist() == [False, True, False]


def test_rank_punishes_what_the_generator_puts_high_only_where_there_is_a_hit():
    # The generator's order is completion 2, 0, 1; completion 0 is the hit.
    with_hit = group([9, 4, -1], positives=[9], log_probs=[-2.0, -3.0, -1.0])
    without = group([3, 4, -1], positives=[9])
    found = score(Rank.Config().build(NOWHERE), with_hit, without)
    first, _, third = weights(3)
    np.testing.assert_allclose(found[0].values, [0, -third, -first], rtol=1e-6)
    assert not found[1].values.any()


def test_legality_draws_a_few_and_discards_the_illegal():
    items = [5, -1] * 64
    function = Legality.Config(num_drawn=5).build(NOWHERE)
    first, again, other = score(function, *(group(items, serial=serial) for serial in (1, 1, 2)))
    drawn = first.mask.sum()
    assert drawn <= 5 and (first.values[first.mask] == 1).all() and not first.mask[1::2].any()
    assert (first.mask == again.mask).all() and (first.mask != other.mask).any()
    (both,) = score(
        Legality.Config(num_drawn=5, discard_illegal=False).build(NOWHERE), group(items, serial=1)
    )
    assert both.mask.sum() == 5 and (first.mask == both.mask & (both.values == 1)).all()
    (everything,) = score(Legality.Config(discard_illegal=False).build(NOWHERE), group([5, -1]))
    assert everything.values.tolist() == [1, 0] and everything.mask.all()


def test_the_code_that_leaves_the_catalogue_is_blamed_and_no_other(tmp_path):
    items = pl.Series("item_id", ["a", "b", "c"])
    codes = np.array([[0, 1, 2], [0, 3, 1], [2, 1, 0]], dtype=np.int32)
    SemanticIdTable(item_ids=items, codes=codes, code_sizes=(4, 4, 4)).save(str(tmp_path))
    paths = [[0, 1, 2], [1, 1, 2], [0, 2, 1], [0, 3, 2], [2, 1, 0]]
    asked = replace(group([0, -1, -1, -1, 2], levels=3), paths=np.array(paths))
    function = IllegalCode.Config().build(RewardSetting(data_path="", semantic_ids=str(tmp_path)))
    (found,) = score(function, asked)
    assert found.values.tolist() == [[0, 0, 0], [-1, 0, 0], [0, -1, 0], [0, 0, -1], [0, 0, 0]]
    assert found.mask.all()
    with pytest.raises(ConfigError, match="semantic IDs"):
        IllegalCode.Config().build(NOWHERE)


def test_relevance_by_hand():
    # Items 0 (1, 0), 1 (0, 1), 2 (diagonal), 3 (-1, 0); history 0 and 1.
    history = last_items([np.array([2, 0, 1]), np.array([], dtype=np.int64)], 2)
    assert history.tolist() == [[0, 1], [-1, -1]]
    items = np.array([[0, 2, 3, -1], [0, 2, 3, -1]])
    root = 1 / np.sqrt(2)
    vectors = UnitVectors(VECTORS)
    np.testing.assert_allclose(relevance(vectors, history, items, 1)[0], [1, root, 0, 0], atol=1e-6)
    np.testing.assert_allclose(relevance(vectors, history, items, 5)[0], [0.5, root, -0.5, 0], atol=1e-6)
    assert not relevance(vectors, history, items, 1)[1].any()


def test_the_gate_closes_for_far_and_for_illegal_items():
    gate = Relevance(Relevance.Config(history=2, threshold=0.5), UnitVectors(VECTORS))
    (found,) = score(gate, group([0, 2, 3, -1], history=[0, 1]))
    assert found.values.tolist() == [1, 1, 0, 0]
    at_the_threshold = Relevance(Relevance.Config(history=2, threshold=0.0), UnitVectors(VECTORS))
    assert score(at_the_threshold, group([1, 2], history=[0]))[0].values.tolist() == [0, 1]
    open_to_all = Relevance(Relevance.Config(history=2, threshold=-2.0), UnitVectors(VECTORS))
    assert score(open_to_all, group([3, -1], history=[0]))[0].values.tolist() == [1, 0]


def test_the_threshold_of_the_gate_is_a_quantile_over_real_next_items(tmp_path):
    data, matrix = str(tmp_path / "shards"), str(tmp_path / "vectors.npy")
    source = WorldSource.Config(num_users=60, num_items=100, num_clusters=5, mean_clicks=8)
    build(source, BuildConfig(out=data, ray="never"))
    np.save(matrix, np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32))
    config = Relevance.Config(vectors=matrix, quantile=0.2)
    thresholds = [find_threshold(Relevance.Config(vectors=matrix, quantile=q), data) for q in (0.0, 0.2, 0.9)]
    assert thresholds == sorted(thresholds) and thresholds[0] < thresholds[2]
    prepared = config.prepared(RewardSetting(data_path=data))
    assert prepared.threshold == thresholds[1] == prepared.to_log()["relevance_threshold"]
    assert prepared.prepared(NOWHERE) is prepared
    lonely = replace(config, vectors=matrix)
    one_click = "user_id,item_id,order\nu,a,1\nv,a,1\n"
    (tmp_path / "events.csv").write_text(one_click)
    source = EventsSource.Config(events=(str(tmp_path / "events.csv"),), order_column="order")
    build(source, BuildConfig(out=str(tmp_path / "lonely"), ray="never"))
    with pytest.raises(ConfigError, match="users with two training events"):
        lonely.prepared(RewardSetting(data_path=str(tmp_path / "lonely")))
    with pytest.raises(ConfigError, match="has none: name a matrix"):
        Diversity.Config().build(RewardSetting(data_path=data))


def test_the_threshold_compares_the_last_item_of_users_with_what_came_before_it_alone(monkeypatch):
    # Before item 2 the user 3 took 0 and 1, before item 3 the user 8 took 0; the user 5 took nothing before.
    users, items = np.array([3, 3, 3, 5, 8, 8]), np.array([0, 1, 2, 3, 0, 3])
    events = TrainingEvents(users=users, items=items, num_items=4)
    monkeypatch.setattr("rl.rewards.relevance.read_training_events", lambda path, *, least_users: events)
    monkeypatch.setattr(UnitVectors, "load", lambda path, file: UnitVectors(VECTORS))
    nearest, farthest = (find_threshold(Relevance.Config(quantile=q), "") for q in (0.999999, 0.0))
    assert (nearest, farthest) == pytest.approx((1 / np.sqrt(2), -1), abs=1e-5)


def test_diversity_by_hand():
    # Cosines: 0 and 1 are orthogonal, 2 has 1/sqrt(2) with both; the illegal one neither gets nor gives.
    (found,) = score(Diversity(UnitVectors(VECTORS)), group([0, 1, 2, -1]))
    root = 1 / np.sqrt(2)
    np.testing.assert_allclose(found.values, [1 - root / 2, 1 - root / 2, 1 - root, 0], atol=1e-6)
    twins, lonely = score(Diversity(UnitVectors(VECTORS)), group([0, 0]), group([0, -1]))
    assert twins.values.tolist() == [0, 0] and lonely.values.tolist() == [0, 0]


def test_popular_items_beyond_their_share_of_a_group_are_punished_in_the_order_drawn():
    is_popular = np.array([True, False, True, False])
    function = Popularity(Popularity.Config(allowed_share=0.4), is_popular)
    found = score(function, group([0, 1, 2, -1, 2]), group([1, 3, 1, 3, 1]), group([2, 2, 2, 2, 2]))
    # Two of five are allowed, and an illegal path is of no item.
    assert [reward.values.tolist() for reward in found] == [
        [0, 0, 0, 0, -1],
        [0, 0, 0, 0, 0],
        [0, 0, -1, -1, -1],
    ]
    assert all(reward.mask.all() for reward in found)


def test_popular_items_are_those_of_the_data_with_most_training_events(tmp_path):
    events = pl.DataFrame(
        {"user_id": np.repeat(range(4), 5), "item_id": [9, 9, 3, 1, 2] * 4, "timestamp_s": [*range(5)] * 4}
    )
    events.write_parquet(tmp_path / "events.parquet")
    source = EventsSource.Config(events=(str(tmp_path / "events.parquet"),))
    build(source, BuildConfig(out=str(tmp_path / "shards"), ray="never"))
    setting = replace(NOWHERE, data_path=str(tmp_path / "shards"))
    function = Popularity.Config(head_share=0.25).build(setting)
    ids = ItemTable.load(setting.data_path).item_ids
    assert [str(name) for name in np.array(ids)[function.is_popular]] == ["9"]


def test_duration_feedback_is_a_percentile_within_the_bucket_of_the_item():
    # Buckets by log2(duration + 1): 10 s and 14 s fall into 3, 100 s into 6, 30 s into 4.
    past = {"play_time_s": np.array([2.0, 6.0, 8.0, 50.0]), "duration_s": np.array([10.0, 14.0, 10.0, 100.0])}
    shown = {
        "play_time_s": np.array([6.0, 40.0, 5.0, 1.0]),
        "duration_s": np.array([14.0, 100.0, 30.0, 10.0]),
        "disliked": np.array([False, False, False, True]),
    }
    given = group(
        [20, 21, 22, 23, 99, -1],
        positives=[20, 21, 22, 23],
        history=[1, 2, 3, 4],
        history_features=past,
        positive_features=shown,
    )
    (found,) = score(Duration.Config().build(NOWHERE), given)
    # 6 s: one below, one equal of three. 40 s: below the only one. 30 s long: no history. Then a dislike.
    np.testing.assert_allclose(found.values[found.mask], [0.5, 0, -1])
    assert found.mask.tolist() == [True, True, False, True, False, False]
    with pytest.raises(DataError, match=r"history_features of user row 7 lack play_time_s, duration_s"):
        score(Duration.Config().build(NOWHERE), group([1], positives=[1]))


@pytest.mark.parametrize("base", [2.0, 3.0, 10.0])
def test_a_bucket_of_durations_begins_with_the_very_power_of_its_base(base):
    function, powers = Duration.Config(base=base).build(NOWHERE), np.arange(1, 7)
    # A second is added to each.
    seconds = (base**powers - 1).astype(np.float32)
    assert function.buckets(seconds).tolist() == powers.tolist()
    assert function.buckets(seconds - 0.5).tolist() == (powers - 1).tolist()


def test_duration_says_nothing_of_a_user_who_took_nothing():
    past, shown = ({"play_time_s": times, "duration_s": times} for times in (np.ones(1), np.zeros(0)))
    given = group([20, -1], history=[1], history_features=past, positive_features=shown)
    (found,) = score(Duration.Config().build(NOWHERE), given)
    assert not found.values.any() and not found.mask.any()


def test_play_times_and_durations_that_are_not_known_say_nothing():
    past = {"play_time_s": np.array([-1.0, -1.0, 8.0, 0.0]), "duration_s": np.array([10.0, 14.0, 10.0, -1.0])}
    shown = {
        "play_time_s": np.array([6.0, -1.0, 5.0, -1.0]),
        "duration_s": np.array([10.0, 10.0, -1.0, 10.0]),
    }
    given = group(
        [20, 21, 22, 23],
        positives=[20, 21, 22, 23],
        history=[1, 2, 3, 4],
        history_features=past,
        positive_features={**shown, "disliked": np.array([0, 0, -1, 1])},
    )
    (found,) = score(Duration.Config().build(NOWHERE), given)
    # Of the history in the bucket of 6 s, the play time of one event is known, and longer. A dislike needs none.
    assert found.mask.tolist() == [True, False, False, True]
    assert found.values[found.mask].tolist() == [0, -1]


def test_calibration_gives_positives_the_best_reward_of_their_group():
    rewards = np.array([[0.2, 0.6, 0.0], [0.0, 0.0, 0.0]])
    is_positive = np.array([[True, False, False], [False, False, True]])
    assert calibrated(rewards, is_positive).tolist() == [[0.6, 0.6, 0.0], [0.0, 0.0, 1.0]]


class KnownPreference:
    """Stands for a trained model: the preference of an item is a tenth of its row."""

    def preferences(self, groups):
        return np.stack([np.where(group.items >= 0, group.items / 10, 0) for group in groups]).astype(
            np.float32
        )


def test_the_hybrid_reward_is_gate_times_preference_with_positives_on_top():
    gate = Relevance(Relevance.Config(history=2, threshold=0.5), UnitVectors(VECTORS))
    given = group([1, 2, 3, -1], positives=[1], history=[0, 1])
    for options, expected in (
        ({}, [0.2, 0.2, 0, 0]),
        ({"calibrate": False}, [0.1, 0.2, 0, 0]),
        ({"gate": False}, [0.3, 0.2, 0.3, 0]),
        ({"discard_illegal": True}, [0.2, 0.2, 0, 0]),
    ):
        config = Hybrid.Config(**options)
        (found,) = score(Hybrid(config, KnownPreference(), gate if config.gate else None), given)
        np.testing.assert_allclose(found.values, expected, rtol=1e-6)
        assert found.mask.tolist() == [True, True, True, not config.discard_illegal]


def test_a_python_function_is_a_reward_by_its_import_path():
    config = PythonFunction.Config(path="tests.rl.test_rewards:twice_the_item").prepared(NOWHERE)
    assert score(config.build(NOWHERE), group([1, 3]))[0].values.tolist() == [2, 6]
    plain = PythonFunction.Config(path="tests.rl.test_rewards:one_for_all").build(NOWHERE)
    assert score(plain, group([1, 3]))[0].values.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_rewards", "MODULE:NAME"),
        ("no_such_module:f", "cannot be imported"),
        ("tests.rl.test_rewards:no_such_name", "cannot be imported"),
        ("tests.rl.test_rewards:VECTORS", "must be callable"),
    ],
)
def test_a_function_that_is_none_is_refused_before_any_worker_starts(path, message):
    with pytest.raises(ConfigError, match=message):
        PythonFunction.Config(path=path).prepared(NOWHERE)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Legality.Config(num_drawn=0), "num-drawn"),
        (lambda: Relevance.Config(nearest=0), "nearest"),
        (lambda: Duration.Config(base=1.0), "base"),
        (lambda: Popularity.Config(allowed_share=1.0), "allowed-share"),
        (lambda: Preference.Config().run_names(), "reward-sim"),
        (lambda: Hybrid.Config().run_names(), "reward-sim"),
        (
            lambda: Process.Config().run_names(),
            r"trained PRM: give its run directory with --rewards.process.run",
        ),
    ],
)
def test_impossible_options_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
