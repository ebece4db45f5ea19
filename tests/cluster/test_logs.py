import os
import signal
import subprocess
import sys

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
