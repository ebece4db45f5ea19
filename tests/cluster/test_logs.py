import os
import signal
import subprocess
import sys

from cluster.configuration import ClusterConfig
from cluster.logs import duration
from cluster.packages import root
from cluster.reporter import Reporter, StopSignal


def test_every_rank_writes_a_file_and_only_what_matters_reaches_the_driver(tmp_path):
    program = f"""
import logging, os
from pathlib import Path
from cluster.logs import start_worker_logs
from cluster.reporter import Reporter
reporter = Reporter(1)
start_worker_logs(reporter, Path({str(tmp_path)!r}))
logging.getLogger("trainer.loop").debug("a detail")
logging.getLogger("trainer.loop").info("a message of rank 1")
logging.getLogger("trainer.loop").warning("a warning of rank %d", 1)
logging.getLogger("some_library").warning("a library warns")
os.write(2, b"last words of a crash")
assert [event.values["message"] for event in reporter.drain()] == ["a warning of rank 1"]
"""
    environment = {**os.environ, "PYTHONPATH": str(root())}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
    text = (tmp_path / "rank-1.log").read_text()
    for line in ("a detail", "a message of rank 1", "a library warns", "last words of a crash"):
        assert line in text


def test_a_reporter_gives_each_event_once_and_in_order():
    reporter = Reporter(0)
    reporter.progress(step=1)
    reporter.progress(step=2)
    assert [event.values["step"] for event in reporter.drain()] == [1, 2]
    assert reporter.drain() == []


def test_a_signal_requests_a_stop_and_the_old_handler_comes_back():
    stop, before = StopSignal(), signal.getsignal(signal.SIGTERM)
    with stop.on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_same_sigterm_to_a_process_and_to_its_group_counts_once():
    stop = StopSignal()
    with stop.on_signals():
        stop.request()  # by a worker that got it a moment earlier
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested, "and this process lives"


def test_a_second_ctrl_c_ends_at_once():
    program = (
        "import os, signal, time\nfrom cluster.reporter import StopSignal\n"
        "with StopSignal().on_signals():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(30)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(root())}, timeout=20
    )
    assert ended.returncode == -signal.SIGINT


def test_who_listens_to_sigterm_still_does_so_once_ray_runs(monkeypatch):
    from ray._private import utils
    from ray._raylet import AuthenticationMode

    from cluster import ray_start

    def start(**options: object) -> None:
        utils.set_sigterm_handler(lambda number, frame: sys.exit(number))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as its C++ part does

    monkeypatch.setattr(ray_start.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_start.ray, "init", start)
    monkeypatch.setattr(ray_start, "get_authentication_mode", lambda: AuthenticationMode.TOKEN)
    stop, take = StopSignal(), utils.set_sigterm_handler
    with stop.on_signals():
        ray_start.start_ray(ClusterConfig())
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested and utils.set_sigterm_handler is take


def test_durations_are_said_in_words():
    assert [duration(seconds) for seconds in (7.4, 200, 7300)] == ["7 s", "3 min 20 s", "2 h 1 min"]
