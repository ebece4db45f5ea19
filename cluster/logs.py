"""Log lines of many processes: every rank writes a file, the driver shows what concerns a person."""

import logging
import os
import sys
from pathlib import Path

from cluster.packages import PACKAGES
from cluster.reporter import Event, Reporter

FILE_FORMAT = "%(asctime)s %(levelname)-7s %(name)s  %(message)s"


def start_worker_logs(reporter: Reporter, directory: Path | None) -> None:
    """Send this rank's log records to the driver and, all of them, to `directory`/rank-N.log.

    What libraries print goes to the same file, so that the last words of a crash are kept.
    """
    to_driver = _ReporterHandler(reporter)
    to_driver.addFilter(_is_ours)
    handlers: list[logging.Handler] = [to_driver]
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(worker_log(directory, reporter.rank), "a", buffering=1)
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(file.fileno(), descriptor)
        to_file = logging.StreamHandler(file)
        to_file.setFormatter(logging.Formatter(FILE_FORMAT))
        handlers.append(to_file)
    _install(handlers, logging.DEBUG)


def worker_log(directory: Path, rank: int) -> Path:
    """The file of one rank among the logs of a run."""
    return directory / f"rank-{rank}.log"


def start_driver_logs(handler: logging.Handler | None = None) -> None:
    """Show INFO and above of the project's packages on the given handler, by default on standard error."""
    handler = handler or logging.StreamHandler()
    if handler.formatter is None:
        handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(_is_ours)
    _install([handler], logging.INFO)


def show_worker_record(event: Event) -> None:
    """Log a worker's record in the driver, with its rank in front."""
    values = event.values
    logging.getLogger(values["name"]).log(values["level"], "[rank %d] %s", event.rank, values["message"])


def duration(seconds: float) -> str:
    """Seconds in words, such as 3 min 20 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class _ReporterHandler(logging.Handler):
    """Sends records to the driver: INFO and above from rank 0, WARNING and above from the others."""

    def __init__(self, reporter: Reporter):
        super().__init__(logging.INFO if reporter.rank == 0 else logging.WARNING)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        values = {"level": record.levelno, "name": record.name, "message": record.getMessage()}
        self.reporter.emit("log", values)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in PACKAGES


_installed: list[logging.Handler] = []


def _install(handlers: list[logging.Handler], level: int) -> None:
    """Replace the handlers of an earlier call; other libraries stay at WARNING."""
    root = logging.getLogger()
    for handler in _installed:
        root.removeHandler(handler)
    _installed[:] = handlers
    for handler in handlers:
        root.addHandler(handler)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level)
