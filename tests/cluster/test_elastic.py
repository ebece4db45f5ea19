import logging
from typing import ClassVar

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from cluster import placement, worker_group
from cluster.configuration import ClusterConfig
from cluster.elastic import allowed_worlds, largest_world
from cluster.errors import ConfigError, PlanError
from cluster.ray_start import start_ray
from cluster.reporter import Event, Pulse
from cluster.watchdog import Watchdog
from cluster.worker_group import run_gang
from tests.cluster.elastic_job import SAVED_EVERY, count_steps


def test_the_limits_give_the_numbers_of_workers():
    assert allowed_worlds(ClusterConfig(workers=3)) == [3]
    assert allowed_worlds(ClusterConfig(workers=3, min_workers=1)) == [1, 2, 3]
    assert allowed_worlds(ClusterConfig(workers=3, max_workers=5)) == [3, 4, 5]
    both = ClusterConfig(workers=4, min_workers=2, max_workers=8)
    assert allowed_worlds(both, multiple_of=2) == [2, 4, 6, 8]


@pytest.mark.parametrize(
    "config",
    [
        ClusterConfig(workers=2, min_workers=3),
        ClusterConfig(workers=2, min_workers=0),
        ClusterConfig(workers=4, max_workers=3),
    ],
)
def test_limits_that_contradict_each_other_are_refused(config):
    with pytest.raises(ConfigError, match=r"cluster.min-workers must be at least 1 and at most .*; got"):
        allowed_worlds(config)


def test_limits_without_any_multiple_are_refused():
    with pytest.raises(
        ConfigError, match=r"from cluster.min-workers 5 to cluster.max-workers 7 is a multiple of 4"
    ):
        allowed_worlds(ClusterConfig(workers=6, min_workers=5, max_workers=7), multiple_of=4)


def test_the_largest_world_that_fits():
    assert [largest_world([2, 4, 6], room) for room in (1, 2, 5, 100)] == [None, 2, 4, 6]


class _Gang:
    """As many workers as the smallest of the worlds; fewer than three are too few for the plan."""

    tried: ClassVar[list[int]] = []

    def __init__(self, config, worlds, *_: object):
        self.size, self.makes_room, self.watchdog = worlds[0], False, Watchdog()

    def start(self, *_: object) -> None:
        self.tried.append(self.size)

    def follow(self) -> int:
        if self.size < 3:
            raise PlanError(f"table item does not fit on {self.size} workers")
        return self.size

    def kill(self) -> None:
        pass


def test_a_world_that_is_too_small_for_the_plan_is_left_for_a_larger_one(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(worker_group, "start_ray", lambda config: None)
    monkeypatch.setattr(worker_group, "_Gang", _Gang)
    config = ClusterConfig(workers=4, min_workers=1)
    assert run_gang(print, config=config, run_dir=str(tmp_path), worlds=allowed_worlds(config)) == 3
    assert _Gang.tried == [1, 2, 3]
    assert "does not fit on 2 workers; going on with 3 to 4 workers" in caplog.text
    with pytest.raises(PlanError, match="does not fit on 2 workers"):
        run_gang(print, config=config, run_dir=str(tmp_path), worlds=[1, 2])


class _GrowingGang(_Gang):
    """As many workers as the largest of the worlds, after a first attempt with the smallest; three are too many."""

    def __init__(self, config, worlds, *_: object):
        super().__init__(config, worlds)
        self.size, self.makes_room = (worlds[-1], False) if self.tried else (worlds[0], True)

    def follow(self) -> int:
        self.watchdog.hear(0, Pulse(step=len(self.tried)))
        if self.size > 2:
            raise PlanError(f"the tables cannot be dealt out to {self.size} workers")
        return self.size


def test_a_gang_that_cannot_work_with_more_goes_on_with_as_many_as_before(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(worker_group, "start_ray", lambda config: None)
    monkeypatch.setattr(worker_group, "_Gang", _GrowingGang)
    monkeypatch.setattr(_Gang, "tried", [])
    config = ClusterConfig(workers=2, min_workers=2, max_workers=3)
    assert run_gang(print, config=config, run_dir=str(tmp_path), worlds=allowed_worlds(config)) == 2
    assert _Gang.tried == [2, 3, 2]
    assert "cannot be dealt out to 3 workers; going on with 2 workers" in caplog.text


def test_a_gang_starts_with_the_room_there_is_and_grows_at_a_checkpoint(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(placement, "_SETTLE_S", 0.5)
    monkeypatch.setattr(worker_group, "_LOOK_FOR_ROOM_S", 0.2)
    config = ClusterConfig(workers=2, min_workers=1, start_timeout_s=60, collective_timeout_s=60)
    start_ray(config)
    others = placement_group([{"CPU": ray.cluster_resources()["CPU"] - 1}])
    assert others.wait(30)
    started: list[tuple[int, int]] = []

    def follow(event: Event) -> None:
        if event.kind == "started":
            started.append((event.values["workers"], event.rank))
        if event.kind == "saved" and event.values["step"] == SAVED_EVERY:
            remove_placement_group(others)

    with caplog.at_level(logging.INFO):
        result = run_gang(
            *(count_steps, str(tmp_path / "step"), 60),
            config=config,
            run_dir=str(tmp_path),
            on_event=follow,
            worlds=allowed_worlds(config),
        )
    assert result == (60, 2)
    assert started == [(1, 0), (2, 0), (2, 1)]
    assert "room for 2 workers: growing from 1 after the next checkpoint" in caplog.text
    assert "restart" not in caplog.text, "growing is no fault"
