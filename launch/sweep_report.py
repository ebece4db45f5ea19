"""What is shown of a sweep: a table, pictures, the law that losses follow, and one page with all."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table

from cluster.errors import ConfigError
from cluster.storage import Storage
from launch.joint_law import JointLaw, Split
from launch.joint_picture import draw_joint_law
from launch.report_page import Section, render_page
from launch.run_directory import REPORT
from launch.scaling_law import ScalingLaw
from launch.sweep_laws import FittedLaw, best_splits, law_of
from launch.sweep_picture import LOSS, SIZES, TARGETS, Row, draw_sweep
from launch.sweep_plan import short_names
from launch.sweep_results import SWEEP, collect, read_sweep, swept_options

RESULTS, PICTURE, JOINT, LAW = "results.csv", "picture.png", "joint.png", "law.json"
_SPLIT_TITLE = "How the law would spend so many operations"
_SPLIT_HEADERS = ("operations", "N", "D", LOSS)


def write_results(out: str, console: Console) -> None:
    """Write table, pictures, law and page of a sweep, and print the table, the law and where they lie.

    Raises: ConfigError where no run has such a number; the table is there all the same.
    """
    storage, sweep = Storage(out), read_sweep(out)
    metric, options = sweep["metric"], swept_options(sweep["runs"])
    rows = collect(out, sweep["runs"], last_part=sweep["last_part"])
    storage.write(RESULTS, pl.DataFrame(rows, infer_schema_length=None).write_csv().encode())
    if rows and metric not in (columns := _columns_of_numbers(rows)):
        raise ConfigError(
            f"--metric must be a column of numbers in {RESULTS} ({', '.join(columns)}), got {metric}"
        )
    view = View.of(rows, options, sweep["against"] or _varied(rows, options), metric)
    for name, content in view.files().items():
        if content is not None:
            storage.write(name, content)
        elif storage.exists(name):
            storage.delete(name)  # of an earlier view
    storage.write(REPORT, _page(out, rows, view))
    if rows:
        console.print(_table(rows, options, metric))
    if view.law is not None:
        console.print(view.note)
    if view.splits:
        console.print(_splits_table(view.splits))
    console.print(f"Written to {storage.path(RESULTS)} and {storage.path(REPORT)}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class View:
    """The finished runs of a sweep, as they are drawn."""

    points: Sequence[Row]
    options: Sequence[str]
    against: str
    metric: str

    @staticmethod
    def of(rows: Sequence[Row], options: Sequence[str], against: str, metric: str) -> "View":
        # What a run was on its way to is no loss of its size.
        ended = [row for row in rows if row["state"] == "finished"]
        points = [row for row in ended if row.get(metric) is not None and row.get(against) is not None]
        return View(points=points, options=options, against=against, metric=metric)

    @cached_property
    def fitted(self) -> FittedLaw | None:
        return law_of(self.points, self.against) if self.metric == LOSS else None

    @property
    def law(self) -> ScalingLaw | JointLaw | None:
        return self.fitted and self.fitted.law

    @cached_property
    def splits(self) -> list[Split]:
        """Of a joint law."""
        return best_splits(self.law, self.points, self.against) if isinstance(self.law, JointLaw) else []

    @property
    def note(self) -> str:
        if self.law is None:
            return ""
        data = f", D: {SIZES[TARGETS]}" if isinstance(self.law, JointLaw) else ""
        missed = f"off by at most {100 * self.law.largest_miss:.1f} %"
        return f"{self.law}, {missed}, N: {SIZES[self.against]}{data}\n{self.fitted.trust}"

    @cached_property
    def pictures(self) -> Mapping[str, bytes]:
        if not self.points:
            return {}
        joint = self.law if isinstance(self.law, JointLaw) else None
        line = None if joint else self.law
        found = {PICTURE: draw_sweep(self.points, self.options, self.against, self.metric, line)}
        if joint:
            found[JOINT] = draw_joint_law(self.points, self.against, joint, self.splits)
        return found

    def files(self) -> dict[str, bytes | None]:
        """What lies beside the table, by name; None where there is no such thing."""
        law = None
        if self.law is not None:
            splits = {"splits": [vars(split) for split in self.splits]} if self.splits else {}
            trust = {"trust": vars(self.fitted.trust)}
            law = json.dumps(
                {"against": self.against, **vars(self.law), **trust, **splits}, indent=1
            ).encode()
        return {LAW: law, **{name: self.pictures.get(name) for name in (PICTURE, JOINT)}}


def _columns(rows: Sequence[Row]) -> list[str]:
    """Those of any row: not all runs have been evaluated."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _columns_of_numbers(rows: Sequence[Row]) -> list[str]:
    return [name for name in _columns(rows) if not any(isinstance(row.get(name), str) for row in rows)]


def _varied(rows: Sequence[Row], options: Sequence[str]) -> str:
    """The number of parameters, unless all runs have the same and there is an option they differ in."""
    is_fixed = len({row["parameters"] for row in rows}) < 2
    return options[0] if is_fixed and options else "parameters"


def _table(rows: Sequence[Row], options: Sequence[str], metric: str) -> Table:
    """The options that runs differ in, and the columns that are looked at first."""
    options = [name for name in options if len({row.get(name) for row in rows}) > 1]
    validated = [name for name in _columns(rows) if name.startswith("valid/")]
    names = dict.fromkeys(["seed", "state", "step", "parameters", LOSS, *validated, metric])
    table, short = Table(), short_names(options)
    table.add_column("settings", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        settings = (f"{short[name]}={row[name]}" for name in options if row[name])
        table.add_row(" ".join(settings), *(_shown(row.get(name)) for name in names))
    return table


def _splits_table(splits: Sequence[Split]) -> Table:
    table = Table(title=_SPLIT_TITLE)
    for name in _SPLIT_HEADERS:
        table.add_column(name, justify="right")
    for cells in _splits_rows(splits):
        table.add_row(*cells)
    return table


def _splits_rows(splits: Sequence[Split]) -> list[list[str]]:
    return [
        [f"{split.flops:.2e}", f"{split.size:,.0f}", f"{split.targets:,.0f}", f"{split.loss:.4f}"]
        for split in splits
    ]


def _page(out: str, rows: Sequence[Row], view: View) -> bytes:
    names = _columns(rows)
    sections = [
        Section(title="Picture", note=view.note, pictures=[*view.pictures.values()]),
        Section(
            title="Runs", headers=names, rows=[[_shown(row.get(name)) for name in names] for row in rows]
        ),
        Section(title="How it was asked for", text=Storage(out).read(SWEEP).decode()),
    ]
    if view.splits:
        sections.insert(
            1, Section(title=_SPLIT_TITLE, headers=_SPLIT_HEADERS, rows=_splits_rows(view.splits))
        )
    return render_page(f"{PurePosixPath(out).name}: a sweep", sections)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}" if value < 1000 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
