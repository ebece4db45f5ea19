import json
import os
import subprocess
import sys
import threading
import time

import pytest

from cluster import lease as leases
from cluster.errors import ClusterError
from cluster.lease import LEASE_NAME, Lease, read_lease
from cluster.packages import root
from cluster.storage import Storage

BEAT_S = 0.1


@pytest.fixture(params=["local", "memory"])
def run_dir(request, tmp_path) -> str:
    """A run directory on disk and one in an object store."""
    return str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path}/run"


def take(run_dir: str, lost=lambda error: None) -> Lease:
    return Lease(run_dir, lost, beat_s=BEAT_S)


def from_elsewhere(run_dir: str) -> dict:
    """Make the lease there look like one of another machine -> its content."""
    storage = Storage(run_dir)
    content = {**read_lease(storage), "machine": "another", "host": "farhost", "pid": 7}
    storage.write(LEASE_NAME, json.dumps(content).encode())
    return content


def test_a_second_job_on_this_machine_is_refused_at_once(run_dir):
    with take(run_dir):
        begun = time.monotonic()
        with pytest.raises(
            ClusterError, match=rf"one job at a time may write to .*run, and process {os.getpid()} on .* does"
        ):
            take(run_dir).__enter__()
        assert time.monotonic() - begun < BEAT_S
    assert Storage(run_dir).list() == [], "it is given back"
    with take(run_dir):
        pass


def test_the_lease_of_a_killed_process_is_taken_over(tmp_path):
    program = (
        "import os\nfrom cluster.lease import Lease\n"
        f"with Lease({str(tmp_path)!r}, print):\n    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(root())}, timeout=60)
    left = read_lease(Storage(tmp_path))
    with take(str(tmp_path)):
        assert read_lease(Storage(tmp_path))["token"] != left["token"]


def test_a_number_that_another_process_has_now_is_not_taken_for_the_holder(tmp_path):
    with take(str(tmp_path)) as own:
        content = {**read_lease(Storage(tmp_path)), "started": 12345}
    Storage(tmp_path).write(LEASE_NAME, json.dumps(content).encode())
    with take(str(tmp_path)) as new:
        assert new is not own


def test_a_lease_of_another_machine_is_watched_and_taken_over_when_it_stays_as_it_is(run_dir):
    with take(run_dir) as first:
        first._ended.set()  # a machine that has lost its power
        from_elsewhere(run_dir)
        begun = time.monotonic()
        with take(run_dir):
            assert time.monotonic() - begun >= leases.MISSED_BEATS * BEAT_S


def test_a_lease_of_another_machine_that_is_kept_fresh_is_respected(run_dir):
    storage, ended = Storage(run_dir), threading.Event()
    with take(run_dir) as first:
        first._ended.set()
        content = from_elsewhere(run_dir)

        def beat() -> None:
            while not ended.wait(BEAT_S):
                content["beats"] += 1
                storage.touch(LEASE_NAME, json.dumps(content).encode())

        other = threading.Thread(target=beat)
        other.start()
        try:
            with pytest.raises(ClusterError, match="and process 7 on farhost does"):
                take(run_dir).__enter__()
        finally:
            ended.set()
            other.join()


def test_a_job_whose_lease_was_taken_over_is_told(run_dir):
    told = []
    with take(run_dir, told.append):
        from_elsewhere(run_dir)
        content = {**read_lease(Storage(run_dir)), "token": "stranger"}
        Storage(run_dir).write(LEASE_NAME, json.dumps(content).encode())
        deadline = time.monotonic() + 10
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "process 7 on farhost does" in str(told[0])
    assert read_lease(Storage(run_dir))["token"] == "stranger", "the other job's lease stays"


def test_of_two_that_take_over_at_once_one_is_refused(run_dir):
    with take(run_dir) as first:
        first._ended.set()
        from_elsewhere(run_dir)
        outcomes, both = [], threading.Barrier(2)

        def try_it() -> None:
            both.wait()
            try:
                with take(run_dir):
                    outcomes.append("held")
                    time.sleep(1.0)
            except ClusterError:
                outcomes.append("refused")

        threads = [threading.Thread(target=try_it) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(outcomes) == ["held", "refused"]


def test_a_half_written_lease_does_not_stand_in_the_way(tmp_path):
    (tmp_path / LEASE_NAME).write_bytes(b'{"tok')
    with take(str(tmp_path)):
        assert read_lease(Storage(tmp_path))["token"]
