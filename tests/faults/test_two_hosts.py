"""Pretraining across two hosts with table rows on both: one is lost in mid-run, and comes back."""

import pytest

from launch.run_status import report_run
from tests.faults.training import Training, assert_everyone_was_seen_once, last_step, pretrain_line
from tests.faults.two_hosts import NoHostsError, TwoHosts
from tests.tiny_run import build_tiny_data

EPOCHS = 25


@pytest.fixture
def hosts():
    try:
        with TwoHosts() as made:
            yield made
    except NoHostsError as error:
        pytest.skip(str(error))


def test_a_host_is_lost_in_mid_run_and_the_run_goes_on_and_grows_when_it_is_back(hosts, tmp_path):
    data, run_dir = build_tiny_data(tmp_path / "data"), tmp_path / "run"
    elastic = ("--cluster.address", hosts.ray_address, "--cluster.min-workers", "1")
    line = pretrain_line(
        data, run_dir, *elastic, "--train.checkpoint-every-steps", "1", "--train.epochs", str(EPOCHS)
    )
    with Training(run_dir, line, prefix=hosts.prefix(1), environment=hosts.environment) as training:
        training.wait_for_step(4)
        assert len(hosts.workers(1)) == len(hosts.workers(2)) == 1
        assert "0: 30, 1: 30" in (run_dir / "plan.txt").read_text(), "each host holds half of the item table"
        hosts.kill_host(2)
        reached = last_step(run_dir)
        training.wait_for(lambda: "1 worker(s) on 1 host(s) started" in training.output())
        hosts.start_ray(2)
        assert training.exit_code() == 0, training.output()
        output = training.output()
    assert "2 worker(s) on 2 host(s) started" in output and "restart 1 of 3" in output
    assert output.count("2 worker(s) on 2 host(s) started") == 2, "it grows when the host is back"
    assert 4 <= reached < last_step(run_dir)
    assert_everyone_was_seen_once(run_dir, EPOCHS)
    report = report_run(str(run_dir))
    assert (report.state, report.status.restarts, report.status.workers) == ("finished", 2, 2)
