"""What a person sees while a run trains: a bar on a terminal, a line now and then anywhere else."""

import logging
import time
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cluster.logs import duration, start_driver_logs
from cluster.reporter import Event

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0


def start_console() -> Console:
    """Send the project's log lines to a terminal without disturbing its progress bars."""
    console = Console(stderr=True)
    if console.is_terminal:
        start_driver_logs(RichHandler(console=console, show_path=False, show_level=False, show_time=False))
    else:
        start_driver_logs()
    return console


class TrainingProgress:
    """Shows the progress events of a gang; a context manager around it."""

    def __init__(self, console: Console):
        self.console = console
        self.bar = Progress(
            BarColumn(bar_width=12),
            TextColumn("{task.fields[numbers]}"),
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
        # The number of steps is an estimate where an epoch's last step takes what is left.
        total = max(values["total_steps"], values["step"])
        left = duration((total - values["step"]) * values["step_s"])
        epoch = min(values["epoch"], values["epochs"])
        numbers = (
            f"epoch {epoch}/{values['epochs']}, step {values['step']}/{total}, "
            f"loss {values['loss']:.4f}, {values['tokens_per_s']:,.0f} tokens/s, {left} left"
        )
        if self.console.is_terminal:
            if self.task is None:
                self.task = self.bar.add_task("", total=total, numbers=numbers)
            self.bar.update(self.task, completed=values["step"], total=total, numbers=numbers)
        elif time.monotonic() - self.said_at > _LINE_EVERY_S:
            self.said_at = time.monotonic()
            logger.info(numbers)
