import logging
from types import SimpleNamespace

from data_streams import pass_progress
from data_streams.canonical import Piece
from data_streams.pass_progress import told


def test_a_long_pass_tells_users_rate_and_time_left(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "data_streams.pass_progress")
    clock = [0.0]
    monkeypatch.setattr(pass_progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    pieces = [Piece(chunk=chunk, start=0, stop=500) for chunk in range(6)]
    for _ in told(pieces):
        clock[0] += 8.0  # seconds that a piece takes
    assert [record.message for record in caplog.records] == [
        "1,000 of 3,000 users of this worker, 62 users/s, 32 s left",
        "2,000 of 3,000 users of this worker, 62 users/s, 16 s left",
    ], "every ten seconds at most, and not at the end"
    caplog.clear()
    assert list(told([])) == [] and not caplog.records
