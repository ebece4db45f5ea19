"""What a run is and what it has reached, as one page in its directory: report.html."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from cluster.plugins import load_plugin, plugin_files
from cluster.storage import Storage
from launch.config_document import from_yaml, to_document
from launch.options import RECIPES
from launch.report_page import Section, render_page
from launch.run_directory import (
    ALIGN,
    ALIGNMENT,
    ALIGNMENT_CURVES,
    CONFIG,
    CURVES,
    EVALUATION,
    EXPERTS,
    REPORT,
    SCALING_PICTURE,
    read_json,
)
from launch.run_status import RunReport, report_run
from trainer.configuration import PLAN
from trainer.slices import slice_rows

_OWN = ("recipe", "run_dir")
"""Options that no two runs share."""


def write_report(run_dir: str) -> str:
    """Put the page together from what lies in the run directory; returns its path."""
    storage = Storage(run_dir)
    document = from_yaml(storage.read(CONFIG).decode(), storage.path(CONFIG))
    sections = [
        Section(title="The run", rows=_facts(report_run(run_dir))),
        _alignment(storage),
        _evaluation(storage),
        _slices(storage),
        Section(title="Curves", pictures=_pictures(storage)),
        Section(
            title="Changed from the recipe",
            headers=("option", "recipe", "here"),
            rows=changed_from_recipe(document),
        ),
        Section(title="Where the table rows lie", text=_text(storage, PLAN)),
        Section(title="All options", text=_text(storage, CONFIG)),
        Section(title="All options of the alignment", text=_text(storage, ALIGN)),
    ]
    name = PurePosixPath(run_dir).name
    storage.write(REPORT, render_page(f"{name}: {document.get('recipe', '')}".rstrip(": "), sections))
    return storage.path(REPORT)


def changed_from_recipe(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Option, the recipe's value and the run's, where they differ; nothing where there is no such recipe (any more)."""
    recipe = document.get("recipe")
    if recipe not in plugin_files(RECIPES):
        return []
    before = dict(_flat(to_document(load_plugin(RECIPES, recipe).recipe())))
    here = dict(_flat(document))
    return [
        (name.replace("_", "-"), _shown(before[name]) if name in before else "", _shown(value))
        for name, value in here.items()
        if name not in _OWN and (name not in before or before[name] != value)
    ]


def _flat(document: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts(report: RunReport) -> list[tuple[str, str]]:
    status = report.status
    facts = {
        "directory": report.run_dir,
        "state": report.state,
        "error": status.error,
        "step": status.step,
        "steps planned": status.total_steps,
        "epoch": status.epoch,
        "training loss": _number(status.loss),
        "supervised targets per second": status.tokens_per_s and f"{status.tokens_per_s:,.0f}",
        "workers": status.workers,
        "last checkpoint": report.checkpoint_step,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _alignment(storage: Storage) -> Section:
    shown = read_json(storage, ALIGNMENT).get("shown", {})
    names = dict.fromkeys(name for metrics in shown.values() for name in metrics)
    rows = [(name, *(_number(metrics.get(name)) for metrics in shown.values())) for name in names]
    return Section(title="Alignment, on held-out items", headers=("metric", *shown), rows=rows)


def _evaluation(storage: Storage) -> Section:
    content = read_json(storage, EVALUATION)
    if not content:
        return Section(title="Evaluation")
    intervals, baselines = content["intervals"], content.get("baselines", {})
    rows = [
        (
            name,
            _number(value),
            " to ".join(map(_number, intervals.get(name, ()))),
            *(_number(metrics.get(name)) for metrics in baselines.values()),
        )
        for name, value in content["metrics"].items()
    ]
    seen = ", items of the known past left out" if content["seen_filtered"] else ""
    return Section(
        title="Evaluation",
        note=f"Step {content['step']}, split {content['split']}, {content['num_users']:,} users{seen}.",
        headers=("metric", "value", "95 % over users", *baselines),
        rows=rows,
    )


def _slices(storage: Storage) -> Section:
    slices = read_json(storage, EVALUATION).get("slices", {})
    return Section(
        title="By training events of the held-out item", headers=("metric", *slices), rows=slice_rows(slices)
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _pictures(storage: Storage) -> list[bytes]:
    names = (CURVES, ALIGNMENT_CURVES, EXPERTS, SCALING_PICTURE)
    return [storage.read(name) for name in names if storage.exists(name)]


def _text(storage: Storage, name: str) -> str:
    return storage.read(name).decode() if storage.exists(name) else ""
