"""`python -m benchmarks [NAME ...]`: ratios against stock libraries, one JSON file for each benchmark."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from cpuinfo import get_cpu_info
from rich.console import Console
from rich.table import Table

from benchmarks.setting.benchmark import Benchmark, Request, Scale
from benchmarks.setting.ranks import measure_on_ranks
from benchmarks.setting.users import build_users
from cluster.errors import ConfigError, GrailError
from cluster.plugins import load_plugin, plugin_files

TIMEOUT_S = 1800.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare parts of the project with plain library code on this machine; it should be idle."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Benchmarks to run; left out, all of them."""
    scale: Scale = "full"
    """small only shows that everything works; its ratios mean nothing and no bar is asked for. accelerator: one process
    and one CUDA device, at sizes for it; the bars are those of the processor and not asked for."""
    data: str | None = None
    """Shards to take users and items from; left out, made-up users (benchmarks/setting/users.py)."""
    results: str = str(Path(__file__).parent / "results")
    """Folder of the JSON files."""


def main(arguments: list[str]) -> int:
    """Exit code 1 where a bar is not met, 2 for a benchmark that does not exist."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks")
    try:
        modules = _modules(options)
    except GrailError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        data = options.data or build_users(Path(folder) / "users", options.scale)
        results = []
        for name, module in modules.items():
            results.append(_run(name, module, options, os.path.abspath(data)))
            _write(Path(options.results), results[-1])
    Console().print(_table(results, options.scale))
    met = all(bar["met"] for result in results for bar in result["bars"])
    return 0 if met or options.scale != "full" else 1


def _modules(options: Options) -> dict[str, Any]:
    """The files of the benchmarks that are to be run. Raises: ConfigError for one that cannot be."""
    modules = {name: load_plugin("benchmarks", name) for name in options.names or plugin_files("benchmarks")}
    if options.scale != "accelerator":
        return modules
    if not torch.cuda.is_available():
        raise ConfigError(
            f"--scale accelerator needs a CUDA device, and torch sees no CUDA device here (torch {torch.__version__}); "
            "give --scale full for this processor"
        )
    able = {name: module for name, module in modules.items() if module.BENCHMARK.on_accelerator}
    if options.names and len(able) < len(modules):
        others = ", ".join(sorted(set(modules) - set(able)))
        raise ConfigError(f"{others} runs on processors only; leave it out, or give --scale full")
    return able


def _run(name: str, module: Any, options: Options, data: str) -> dict[str, Any]:
    benchmark: Benchmark = module.BENCHMARK
    with tempfile.TemporaryDirectory(prefix=f"benchmark-{name}-") as scratch:
        request = Request(scale=options.scale, data=data, scratch=scratch)
        threads = 1 if options.scale == "small" else benchmark.threads_per_rank
        use_gpu = options.scale == "accelerator"
        world_size = 1 if use_gpu else benchmark.world_size
        measured = measure_on_ranks(
            module.measure, world_size, threads, request, timeout_s=TIMEOUT_S, use_gpu=use_gpu
        )
    return {
        "name": name,
        "unit": benchmark.unit,
        "command": _command(name, options),
        **measured,
        "bars": [
            {"bar": str(bar), "value": measured[bar.key], "met": bar.is_met(measured)}
            for bar in benchmark.bars
        ],
        "scale": options.scale,
        "users": options.data or "made up",
        "processes": world_size,
        "threads_per_process": threads,
        "cores": os.cpu_count(),
        "processor": torch.cuda.get_device_name() if use_gpu else get_cpu_info().get("brand_raw", ""),
        "torch": torch.__version__,
        "commit": _commit(),
        "load_average": os.getloadavg()[0],
    }


def _commit() -> str:
    """What was measured, with a mark for changes that are not in it; empty outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _command(name: str, options: Options) -> str:
    words = ["python", "-m", "benchmarks", name]
    words += ["--scale", options.scale] if options.scale != "full" else []
    return shlex.join(words + (["--data", options.data] if options.data else []))


def _write(folder: Path, result: dict[str, Any]) -> None:
    """The numbers, and a picture of the curves where a benchmark has some (read back from JSON: keys are text)."""
    folder.mkdir(parents=True, exist_ok=True)
    if "curves" in result:
        from benchmarks.setting.cost import draw_curves

        result["exponents"] = draw_curves(folder / f"{result['name']}.png", result["curves"])
    file_name = result["name"] + ("-accelerator" if result["scale"] == "accelerator" else "")
    (folder / f"{file_name}.json").write_text(json.dumps(result, indent=2) + "\n")


def _table(results: list[dict[str, Any]], scale: Scale) -> Table:
    what = {"full": "", "small": ", at a size that means nothing", "accelerator": ", on an accelerator"}
    title = "Ours against stock libraries" + what[scale]
    table = Table(title=title)
    table.add_column("benchmark", min_width=max(len(result["name"]) for result in results))
    for column in ("ours", "peer", "ratio", "processor time", "bars"):
        table.add_column(column)
    for result in results:
        cpu = result["cpu_seconds"]
        table.add_row(
            f"{result['name']}\n[dim]{result['unit']}",
            _rounded(result["ours"]),
            _rounded(result["peer"]),
            _rounded(result["ratio"]),
            f"{_rounded(cpu['ours'])} / {_rounded(cpu['peer'])} s",
            "\n".join(_verdict(bar, scale) for bar in result["bars"]),
        )
    return table


def _verdict(bar: dict[str, Any], scale: Scale) -> str:
    said = f"{bar['bar']}: {_rounded(bar['value'])}"
    if scale != "full":
        return said
    return f"{said}, met" if bar["met"] else f"{said}, [bold red]NOT MET"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
