"""List runs: state, progress, workers, last checkpoint: grail status [DIR...] [--json]"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.logs import duration
from launch.options import parse
from launch.run_status import RunReport, find_runs, report_run

DEFAULT = "runs"


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """List runs: state, progress, workers, last checkpoint."""

    json: bool = False
    """Print one JSON object a run instead of a table."""


def run(arguments: list[str]) -> int:
    folders = [word for word in arguments if not word.startswith("-")]
    options = parse(
        StatusOptions, [word for word in arguments if word.startswith("-")], program="grail status [DIR...]"
    )
    runs = dict.fromkeys(run_dir for folder in folders or [DEFAULT] for run_dir in find_runs(folder))
    reports = [report_run(run_dir) for run_dir in runs]
    if options.json:
        for report in reports:
            print(json.dumps(asdict(report)))
    else:
        _show(reports)
    return 0


def _show(reports: list[RunReport]) -> None:
    rows = [("run", "state", "progress", "workers", "restarts", "last checkpoint", "last sign")]
    rows += [_row(report) for report in reports]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for report in reports:
        if report.status.error:
            print(f"{_short(report.run_dir)}: {report.status.error}")


def _row(report: RunReport) -> tuple[str, ...]:
    status, saved = report.status, report.checkpoint_step
    return (
        _short(report.run_dir),
        report.state,
        _progress(report),
        "" if status.workers is None else f"{status.workers} on {status.hosts} host(s)",
        str(status.restarts),
        "none" if saved is None else f"step {saved}, {_age(report.checkpoint_age_s)} ago",
        "" if report.age_s is None else f"{_age(report.age_s)} ago",
    )


def _short(run_dir: str) -> str:
    """Seen from here, where it lies below."""
    return run_dir.removeprefix(f"{Path.cwd()}/")


def _progress(report: RunReport) -> str:
    status = report.status
    parts = (("step", status.step, status.total_steps), ("epoch", status.epoch, status.epochs))
    return ", ".join(f"{name} {_of(done, planned)}" for name, done, planned in parts if done is not None)


def _of(done: int, planned: int | None) -> str:
    """A run that ended before its first report has told of its checkpoints alone."""
    return str(done) if planned is None else f"{done}/{planned}"


def _age(seconds: float | None) -> str:
    return "?" if seconds is None else duration(seconds)
