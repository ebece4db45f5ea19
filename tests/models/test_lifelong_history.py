"""Histories that are thinned out: clusters, the events that stand for them, and what is never lost."""

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError
from models.lifelong_history import (
    KEPT,
    LifelongConfig,
    item_vectors,
    lifelong_span,
    representatives,
    with_lifelong,
)
from models.predicted_events import with_newest
from tests.training_cases import make_batch


def test_the_event_nearest_to_each_centre_stands_for_its_cluster():
    # Two users; eight events of the first in two far heaps, of which 2 and 6 lie in the middle.
    points = [-1.0, 1.0, 0.1, 0.2, 99.0, 101.0, 100.1, 100.2, 50.0, 50.0]
    kept = representatives(np.array(points, dtype=np.float32)[:, None], np.array([3] * 8 + [7] * 2), 4)
    assert np.flatnonzero(kept).tolist() == [2, 6, 8]


def test_clusters_are_split_until_none_is_larger_than_the_threshold():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(700, 4)).astype(np.float32)
    groups = np.repeat([0, 1, 2], [600, 90, 10])
    kept = representatives(vectors, groups, 10)
    by_group = np.bincount(groups[kept])
    # A cluster holds at most 10 events, so there are at least as many as this.
    assert by_group[0] >= 60 and by_group[1] >= 9 and by_group[2] == 1
    assert kept.sum() < 500


def test_a_cluster_is_split_into_the_cube_root_of_its_size():
    # Three heaps of nine: three parts are small enough, and with more of them several events would stand for a heap.
    heaps = np.repeat([0.0, 100.0, 200.0], 9) + np.tile(np.arange(9.0), 3)
    kept = representatives(heaps[:, None].astype(np.float32), np.zeros(27, dtype=np.int64), 9)
    assert np.flatnonzero(kept).tolist() == [4, 13, 22]


def test_equal_events_cannot_be_split_and_one_stands_for_all():
    kept = representatives(np.ones((50, 3), dtype=np.float32), np.zeros(50, dtype=np.int64), 10)
    assert np.flatnonzero(kept).tolist() == [0]


def test_items_whose_codes_begin_alike_are_near():
    codes = np.array([[1, 2, 3], [1, 2, 0], [1, 0, 0], [0, 0, 0]])
    vectors = item_vectors(codes, (4, 4, 4))
    away = ((vectors - vectors[0]) ** 2).sum(1)
    assert away[0] == 0 and (np.diff(away) > 0).all()


def seen_at(place, chosen, max_events):
    """Places of the first user's events that the queries read behind the event at a place."""
    since, until = lifelong_span(chosen.items, chosen.supervision[KEPT], max_events)
    own = slice(0, int(chosen.items.offsets[1]))
    return torch.nonzero((since[own] <= place + 1) & (place + 1 < until[own]))[:, 0].tolist()


def test_every_target_reads_the_first_event_and_the_latest_ones_before_it():
    config, nothing = LifelongConfig(num_queries=2, max_events=3), np.zeros((97, 2), dtype=np.float32)
    # The last item of a user is a target alone.
    chosen = with_lifelong(with_newest(make_batch([torch.arange(9), torch.arange(4)]), None), config, nothing)
    assert seen_at(7, chosen, 3) == [0, 5, 6, 7]
    for place in range(8):
        alone = with_lifelong(with_newest(make_batch([torch.arange(place + 2)]), 1), config, nothing)
        assert seen_at(place, chosen, 3) == seen_at(place, alone, 3)
        assert len(seen_at(place, chosen, 3)) == min(place + 1, 4)


def test_only_long_histories_are_clustered():
    batch = with_newest(make_batch([torch.zeros(9, dtype=torch.int64), torch.arange(4)]), 1)
    vectors = np.arange(97, dtype=np.float32)[:, None]
    many = with_lifelong(batch, LifelongConfig(num_queries=2, cluster_events=8), vectors)
    few = with_lifelong(batch, LifelongConfig(num_queries=2, cluster_events=4), vectors)
    assert many.supervision[KEPT].values.all()
    assert torch.nonzero(few.supervision[KEPT].values)[:, 0].tolist() == [0, 8, 9]


def test_no_target_depends_on_events_after_it():
    config, vectors = LifelongConfig(num_queries=2, cluster_events=4), np.random.default_rng(0)
    vectors = vectors.normal(size=(97, 3)).astype(np.float32)
    users = [torch.arange(30), torch.arange(40, 46), torch.zeros(1, dtype=torch.int64)]
    changed = [torch.cat((users[0][:27], torch.tensor([90, 91, 92]))), *users[1:]]
    kept = [
        with_lifelong(with_newest(make_batch(these), 4), config, vectors).supervision[KEPT].values
        for these in (users, changed)
    ]
    # Of 29 events the last four are predicted from: all but the first 26 are read as they are.
    assert torch.equal(*kept)
    assert not kept[0][:26].all() and kept[0][26:29].all()
    alone = with_lifelong(with_newest(make_batch([users[0][:27]]), 1), config, vectors)
    assert torch.equal(kept[0][:26], alone.supervision[KEPT].values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_queries": -1},
            "must be 0 or more, num-blocks and max-events 1 or more, got -1, 0, 2 and 2000",
        ),
        ({"cluster_events": 5}, "there are none; set num-queries too, or leave cluster-events out"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LifelongConfig(**options)
