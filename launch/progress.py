"""What a person sees while a run trains: a bar on a terminal, a line now and then anywhere else."""

import logging
import time
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cluster.logs import start_driver_logs
from cluster.reporter import Event

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0


def start_console() -> Console:
    """Send the project's log lines to a terminal without disturbing its progress bars."""
    console = Console(stderr=True)
    if console.is_terminal:
        start_driver_logs(RichHandler(console=console, show_path=False, show_level=False, markup=False))
    else:
        start_driver_logs()
    return console


class TrainingProgress:
    """Shows the progress events of a gang; a context manager around it."""

    def __init__(self, console: Console):
        self.console = console
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task: TaskID | None = None
        self.said_at = 0.0

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def on_event(self, event: Event) -> None:
        if event.kind == "progress":
            self._show(dict(event.values))

    def _show(self, values: dict[str, Any]) -> None:
        left = duration((values["total_steps"] - values["step"]) * values["step_s"])
        numbers = (
            f"loss {values['loss']:.4f}, {values['tokens_per_s']:,.0f} tokens/s, "
            f"{1000 * values['step_s']:.0f} ms/step, {left} left"
        )
        epoch = f"{min(values['epoch'], values['epochs'])}/{values['epochs']}"
        if self.console.is_terminal:
            if self.task is None:
                self.task = self.bar.add_task("", total=values["total_steps"], epoch=epoch, numbers=numbers)
            self.bar.update(self.task, completed=values["step"], epoch=epoch, numbers=numbers)
        elif time.monotonic() - self.said_at > _LINE_EVERY_S:
            self.said_at = time.monotonic()
            logger.info("epoch %s, step %d of %d: %s", epoch, values["step"], values["total_steps"], numbers)


def duration(seconds: float) -> str:
    """Seconds in words, such as 3 min 20 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
