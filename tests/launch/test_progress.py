import io
import logging

from rich.console import Console

from cluster.reporter import Event
from launch.progress import TrainingProgress

VALUES = {
    "step": 30,
    "total_steps": 90,
    "epoch": 1,
    "epochs": 3,
    "loss": 2.5,
    "tokens_per_s": 12345.6,
    "step_s": 2.0,
}


def test_a_terminal_shows_a_bar_with_rate_loss_and_time_left():
    output = io.StringIO()
    with TrainingProgress(Console(file=output, force_terminal=True, width=100)) as progress:
        progress.on_event(Event(kind="progress", rank=0, values=VALUES))
    assert "epoch 1/3, step 30/90, loss 2.5000, 12,346 tokens/s, 2 min 0 s left" in output.getvalue()


def test_elsewhere_there_is_a_line_now_and_then(caplog):
    with caplog.at_level(logging.INFO), TrainingProgress(Console(file=io.StringIO())) as progress:
        for step in (30, 31):
            progress.on_event(Event(kind="progress", rank=0, values={**VALUES, "step": step}))
    assert caplog.text.count("tokens/s") == 1


def test_more_steps_than_planned_leave_no_negative_time(caplog):
    with caplog.at_level(logging.INFO), TrainingProgress(Console(file=io.StringIO())) as progress:
        progress.on_event(Event(kind="progress", rank=0, values={**VALUES, "step": 91}))
    assert "step 91/91" in caplog.text and "0 s left" in caplog.text
