"""Put what a run or a sweep is and has reached on one page: grail report DIR..."""

from dataclasses import dataclass

from cluster.errors import ConfigError
from cluster.storage import Storage
from launch.options import parse
from launch.run_directory import absolute
from launch.run_status import find_runs


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write report.html into the directories of runs or of sweeps: tables and pictures on one page that needs no other
    file. Commands that end a run write it too."""


def run(arguments: list[str]) -> int:
    folders = [word for word in arguments if not word.startswith("-")]
    parse(ReportOptions, [word for word in arguments if word.startswith("-")], program="grail report DIR...")
    if not folders:
        raise ConfigError("grail report needs the directories of runs or sweeps, such as runs/mine")
    from rich.console import Console

    from launch.report import write_report
    from launch.sweep_report import write_results
    from launch.sweep_results import SWEEP

    for folder in (absolute(folder).rstrip("/") for folder in folders):
        if Storage(folder).exists(SWEEP):
            write_results(folder, Console())
            continue
        for run_dir in find_runs(folder):
            print(write_report(run_dir))
    return 0
