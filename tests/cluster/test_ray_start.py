"""The start of an embedded Ray on a machine that is too busy for Ray's own patience."""

import subprocess

import psutil
import pytest

from cluster import ray_start
from cluster.errors import ClusterError

LATE = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


class BusyMachine:
    """Stands for `ray.init`: leaves a daemon behind and gives up, as often as it is told."""

    def __init__(self, failures: int, message: str = LATE):
        self.failures, self.message, self.daemons = failures, message, []

    def __call__(self, **options):
        self.daemons.append(subprocess.Popen(["sleep", "60"]))
        if len(self.daemons) <= self.failures:
            raise Exception(self.message)

    def alive(self) -> list[bool]:
        return [
            daemon.poll() is None and psutil.Process(daemon.pid).status() != psutil.STATUS_ZOMBIE
            for daemon in self.daemons
        ]

    def end(self):
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()


@pytest.fixture
def busy(monkeypatch):
    machines = []

    def make(**options) -> BusyMachine:
        machines.append(BusyMachine(**options))
        monkeypatch.setattr(ray_start.ray, "init", machines[-1])
        return machines[-1]

    yield make
    for machine in machines:
        machine.end()


def test_ray_is_started_again_without_what_was_left_of_the_start_before(busy):
    machine = busy(failures=2)
    ray_start._init_patiently(60.0)
    for daemon in machine.daemons[:2]:
        daemon.wait(timeout=10)
    assert machine.alive() == [False, False, True]


def test_a_machine_that_stays_busy_is_told_of_in_a_line(busy):
    machine = busy(failures=9)
    with pytest.raises(ClusterError, match=r"cluster.start-timeout-s 0 s.*this machine is too busy"):
        ray_start._init_patiently(0.0)
    machine.daemons[0].wait(timeout=10)
    assert len(machine.daemons) == 1


def test_other_errors_of_a_start_are_not_waited_for(busy):
    machine = busy(failures=1, message="no such option")
    with pytest.raises(Exception, match="no such option"):
        ray_start._init_patiently(60.0)
    assert machine.alive() == [True]
