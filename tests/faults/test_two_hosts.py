"""Pretraining across two hosts with table rows on both: one is lost in mid-run, and the run goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest

from launch.run_status import report_run
from tests.faults.training import assert_everyone_was_seen_once, last_step, pretrain_line
from tests.faults.two_hosts import TwoHosts
from tests.tiny_run import build_tiny_data


@pytest.fixture
def hosts():
    with TwoHosts() as made:
        made.start_ray(1)
        made.start_ray(2)
        yield made


def wait_for(happened, job, log, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert job.poll() is None, f"ended with {job.returncode}:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"nothing after {timeout_s} s:\n{log.read_text()}"
        time.sleep(0.02)


def test_a_host_is_lost_in_mid_run_and_the_run_goes_on_with_the_other(hosts, tmp_path):
    data, run_dir = build_tiny_data(tmp_path / "data"), tmp_path / "run"
    run_dir.mkdir()
    elastic = ("--cluster.address", hosts.ray_address, "--cluster.min-workers", "1")
    line = pretrain_line(data, run_dir, *elastic, "--train.checkpoint-every-steps", "1")
    log = tmp_path / "driver.txt"
    command = hosts.command(1, sys.executable, "-m", "launch.cli", *line)
    with open(log, "w") as file:
        job = subprocess.Popen(
            command, env=hosts.environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        wait_for(lambda: last_step(run_dir) >= 4, job, log)
        assert len(hosts.workers(1)) == len(hosts.workers(2)) == 1
        assert "0: 30, 1: 30" in (run_dir / "plan.txt").read_text(), "each host holds half of the item table"
        hosts.kill_host(2)
        reached = last_step(run_dir)
        assert job.wait(120) == 0, log.read_text()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    output = log.read_text()
    assert "2 worker(s) on 2 host(s) started" in output and "restart 1 of 3" in output
    assert "1 worker(s) on 1 host(s) started" in output and 4 <= reached < last_step(run_dir)
    assert_everyone_was_seen_once(run_dir)
    report = report_run(str(run_dir))
    assert (report.state, report.status.restarts, report.status.workers) == ("finished", 1, 1)
