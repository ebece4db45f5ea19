"""The synthetic world: reproducible user by user, plausible, and truthful about its own probabilities."""

from dataclasses import asdict
from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from cluster.errors import ConfigError
from cluster.storage import Storage
from data_streams.build import BuildConfig, build
from data_streams.shards import Manifest
from data_streams.sources.world import WorldSource
from data_streams.world import World, WorldConfig, world_fingerprint
from data_streams.world_history import APPEAL_BIAS, appeal
from launch.world_truth import load_truth

SMALL = {"num_users": 400, "num_items": 300, "num_clusters": 15, "mean_clicks": 12.0, "seed": 3}


@pytest.fixture(scope="module")
def world():
    return World(WorldConfig(**SMALL))


@pytest.fixture(scope="module")
def events():
    source = WorldSource.Config(**SMALL).build()
    return pl.concat([batch for part in source.parts() for batch in source.read(part)])


def last_clicks(events):
    clicks = events.filter(pl.col("action") == "click")
    return clicks.group_by("user_id", maintain_order=True).last().sort("user_id")["item_id"].to_numpy()


def test_the_events_of_a_user_do_not_depend_on_who_is_made_beside_it(world):
    together = world.histories(np.array([5, 6, 7])).events
    alone = world.histories(np.array([6])).events
    mine = together["row"] == 1
    for name in alone.keys() - {"row"}:
        assert (together[name][mine] == alone[name]).all()


def test_another_seed_is_another_world(world):
    other = World(WorldConfig(**{**SMALL, "seed": 4}))
    assert (world.catalogue.cluster != other.catalogue.cluster).any()
    assert (
        world.histories(np.arange(3)).events["item"].tolist()
        != other.histories(np.arange(3)).events["item"].tolist()
    )


def test_pages_show_distinct_items_at_rising_positions_and_clicks_fall_on_what_is_shown(events):
    shown = events.filter(pl.col("action") == "exposure")
    assert shown.select("page_id", "item_id").is_duplicated().sum() == 0
    pages = shown.group_by("page_id", maintain_order=True).agg("position")
    assert all(positions == list(range(len(positions))) for positions in pages["position"].to_list())
    chosen = events.filter(pl.col("action") != "exposure")
    place = ["page_id", "item_id", "position"]
    assert chosen.join(shown, on=place, how="anti").height == 0
    assert 6 < shown.height / pages.height < 10


def test_carts_follow_clicks_and_purchases_follow_carts(events):
    steps = {action: events.filter(pl.col("action") == action) for action in ("click", "cart", "purchase")}
    place = ["page_id", "item_id"]
    for earlier, later in (("click", "cart"), ("cart", "purchase")):
        pairs = steps[later].join(steps[earlier], on=place, suffix="_before")
        assert pairs.height == steps[later].height > 50
        assert (pairs["timestamp_s"] > pairs["timestamp_s_before"]).all()


def test_times_rise_and_nobody_clicks_an_item_twice(events):
    rising = events.select(pl.col("timestamp_s").diff().over("user_id")).to_series().drop_nulls()
    assert (rising >= 0).all()
    clicks = events.filter(pl.col("action") == "click")
    assert clicks.select("user_id", "item_id").is_duplicated().sum() == 0
    assert (clicks["play_time_s"] <= clicks["duration_s"]).all()


def test_attention_falls_with_the_position(events):
    rate = (
        events.filter(pl.col("action").is_in(["exposure", "click"]))
        .group_by("position")
        .agg((pl.col("action") == "click").sum() / (pl.col("action") == "exposure").sum())
        .sort("position")["action"]
    )
    assert rate[0] > 1.4 * rate[6]


@pytest.mark.parametrize("noise", [1.0, 1.6])
def test_the_oracle_knows_the_probability_of_the_held_out_clicks(noise):
    """Over many users each probability must come true as often as it says (calibration in bins)."""
    big = World(WorldConfig(**{**SMALL, "num_users": 3_000, "noise": noise}))
    users = np.arange(3_000)
    clicked = big.histories(users).moments["end"].clicked
    last = (clicked >= 0).sum(1) - 1
    probability = np.concatenate([big.oracle_scores(users, moment) for moment in ("test", "validation")])
    assert np.allclose(probability.sum(1), 1)
    hit = np.zeros_like(probability, dtype=bool)
    hit[np.arange(6_000), np.concatenate([clicked[users, last], clicked[users, last - 1]])] = True
    for low, high in pairwise((0, 1e-3, 1e-2, 3e-2, 0.1, 0.2, 1.0)):
        inside = (probability > low) & (probability <= high)
        expected = probability[inside].sum()
        assert abs(hit[inside].sum() - expected) < 4 * np.sqrt(expected), (low, high)


def test_the_oracle_excludes_what_was_clicked_before_but_not_the_held_out_click(world, events):
    users = np.arange(SMALL["num_users"])
    states = world.states(users, "test")
    scores = world.oracle_scores(users)
    rows, places = np.nonzero(states.clicked >= 0)
    assert (scores[rows, states.clicked[rows, places]] == 0).all()
    assert (scores[users, last_clicks(events)] > 0).all()


def test_the_oracle_ranks_far_above_popularity(world, events):
    users, target = np.arange(SMALL["num_users"]), last_clicks(events)
    counts = np.bincount(events.filter(pl.col("action") == "click")["item_id"], minlength=SMALL["num_items"])
    scores = world.oracle_scores(users)
    popularity = np.where(scores > 0, counts, -1)

    def recall(scores):
        return np.mean((scores > scores[users, target][:, None]).sum(1) < 10)

    assert recall(scores) > 2.5 * recall(popularity)


def test_a_random_list_scores_0_and_the_best_list_1(world):
    users = np.arange(200)
    states = world.states(users, "end")
    everything = world.click_probability(states, np.tile(np.arange(SMALL["num_items"]), (200, 1)))
    best = np.argsort(-everything, axis=1)[:, :10]
    assert np.allclose(world.normalised_utility(users, best), 1)
    rng = np.random.default_rng(0)
    lists = np.array([rng.permutation(np.flatnonzero(row > 0))[:10] for row in everything])
    assert abs(np.mean(world.normalised_utility(users, lists))) < 0.03


def test_expected_positives_count_nothing_twice_and_nothing_clicked_or_empty(world):
    users = np.array([1, 2])
    states = world.states(users, "end")
    fresh = np.array([np.flatnonzero(~np.isin(np.arange(300), states.clicked[row]))[:2] for row in range(2)])
    plain = world.expected_positives(users, fresh)
    padded = np.column_stack([fresh, fresh[:, 0], states.clicked[:, 0], [-1, -1]])
    assert np.allclose(world.expected_positives(users, padded), plain)
    assert (plain > 0).all()


def test_a_built_world_can_be_found_again_from_its_manifest(tmp_path, world):
    out = str(tmp_path / "world")
    manifest = build(WorldSource.Config(**SMALL), BuildConfig(out=out, ray="never"))
    assert manifest.actions == ["click"]
    assert manifest.num_users == SMALL["num_users"]
    assert manifest.num_items == SMALL["num_items"]
    again = World.from_source(Manifest.load(Storage(out)).source)
    assert again.config == world.config
    titles = pl.read_parquet(f"{out}/items.parquet")["title"]
    assert titles.n_unique() == SMALL["num_items"]
    assert titles[0].split()[0].isalpha()
    with pytest.raises(
        ConfigError, match="only data built from the world knows its truth, given source 'events'"
    ):
        World.from_source({"name": "events"})


def test_impossible_worlds_are_refused():
    with pytest.raises(ConfigError, match="--num-clusters must be from 3 to the number of items, given 9"):
        WorldConfig(num_items=8, num_clusters=9)
    with pytest.raises(ConfigError, match="--noise of the world must be above 0, given 0"):
        WorldConfig(noise=0)
    with pytest.raises(ConfigError, match="--seed of the world must be at least 0, given -1"):
        WorldConfig(seed=-1)
    with pytest.raises(ConfigError, match="from 3 to an eighth of the items, given 6000 users, 400 clicks"):
        WorldConfig(num_items=2_400, mean_clicks=400)


def test_the_truth_speaks_in_rows_of_the_data_set(tmp_path):
    path = str(tmp_path / "shards")
    build(WorldSource.Config(**SMALL), BuildConfig(out=path, ray="never"))
    truth = load_truth(path, "test")
    rows = np.arange(600) % 400
    scores = truth.oracle_scores(rows[:5])
    raw = truth.world.oracle_scores(truth.user_ids[rows[:5]], "test")
    assert np.allclose(scores, raw[:, truth.item_ids]) and scores.shape == (5, 300)
    lists = np.random.default_rng(0).integers(-1, 300, (600, 10))
    found = truth.utilities(rows, lists, (5, 10))
    items = np.where(lists >= 0, truth.item_ids[lists], -1)
    expected = truth.world.normalised_utility(truth.user_ids[rows], items[:, :5], "test")
    assert np.allclose(found[5], expected) and found[10].shape == (600,)
    assert load_truth(path, "valid").moment == "validation"


def test_noise_makes_clicks_tell_less_and_the_truth_knows_it():
    users, lists = np.arange(200), np.broadcast_to(np.arange(300), (200, 300))
    best = []
    for noise in (0.7, 1.0, 1.6):
        noisy = World(WorldConfig(**SMALL, noise=noise))
        states = noisy.states(users, "test")
        best.append(np.sort(noisy.click_probability(states, lists), axis=1)[:, -10:].mean())
        clicked, scores = states.clicked[:, :3], noisy.oracle_scores(users)
        assert (np.take_along_axis(scores, clicked, axis=1) == 0).all() and np.allclose(scores.sum(1), 1)
        odds = appeal(noisy.catalogue, states, lists, noise) - APPEAL_BIAS
        assert np.allclose(odds * noise, appeal(noisy.catalogue, states, lists, 1.0) - APPEAL_BIAS)
    assert best[0] > best[1] + 0.05 and best[1] > best[2] + 0.05


def test_shards_of_before_there_was_noise_know_their_truth(world):
    source = {
        "name": "world",
        **{name: value for name, value in asdict(world.config).items() if name != "noise"},
    }
    assert World.from_source(source).config == world.config


def test_the_defaults_of_the_world_are_frozen():
    """Results of alignment are compared on it: whoever changes the world changes this line and repeats them."""
    assert world_fingerprint() == "2c1c13fd9de3b775"
    assert world_fingerprint(WorldConfig(seed=1)) != world_fingerprint()
    assert world_fingerprint(WorldConfig(num_users=7_000)) != world_fingerprint()
    assert world_fingerprint(WorldConfig(noise=1.1)) != world_fingerprint()
