"""Test-time scaling: what a search finds and costs as a PRM scores more candidates, beside plain wider beams and the
plain beams of other models."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Group
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from cluster.errors import ConfigError
from sharding.collectives import exchange_integers
from trainer.assembly import Assembly
from trainer.configuration import SearchConfig
from trainer.evaluate import evaluate
from trainer.search import Search

WITHOUT_INTERVALS = 0
_METRIC_WIDTH, _SEARCH_WIDTH = 20, 11
"""Characters of a table's columns with their borders; the names of searches are folded."""


def compare_searches(assembly: Assembly, *, prm: Assembly | None, split: str) -> list[dict[str, Any]]:
    """One line per search: kind, K+ or width, metrics of evaluation, GFLOP and milliseconds per user; collective.

    All searches are measured by the `search.width` best items and prefixes, also those whose beam is wider.
    """
    lines = plain_beams(assembly, split=split)
    for number in assembly.config.search.candidates:
        chosen = replace(assembly.config.search, candidates=(number,))
        lines.append({"kind": "prm", **_measure(assembly, chosen, split, number, prm=prm)})
    return lines


def plain_beams(assembly: Assembly, *, split: str) -> list[dict[str, Any]]:
    """Lines of plain beams as wide at all depths as the configured candidates are many; collective.

    Raises: ConfigError where there are fewer items than candidates.
    """
    config, num_items = assembly.config.search, assembly.items.num_items
    if config.space == "catalogue" and max(config.candidates, default=0) > num_items:
        raise ConfigError(
            f"several search.candidates are compared with plain beams as wide, so they must not exceed the {num_items} "
            f"items of the catalogue, and {max(config.candidates)} do; lower them"
        )
    unguided = replace(config, earlier_widths=(), prm=False, prm_run="", candidates=(), prm_depths=())
    widths = [config.width, *(number for number in config.candidates if number > config.width)]
    measured = [_measure(assembly, replace(unguided, width=width), split, width) for width in widths]
    return [{"kind": "plain", **line} for line in measured]


def beams_beside(assembly: Assembly, *, fingerprint: str, split: str) -> list[dict[str, Any]]:
    """Lines of the plain beams of another run, which must generate the semantic IDs of this fingerprint; collective.

    Raises: ConfigError where it does not, or proposes no codes.
    """
    table, run_dir = assembly.semantic_ids, assembly.config.run_dir
    if getattr(assembly.config.model, "needs_prm", False):
        raise ConfigError(
            f"runs beside are searched by plain beams, and the {type(assembly.model).__name__} in {run_dir} proposes "
            "no codes; leave it out"
        )
    if table is None or table.fingerprint != fingerprint:
        raise ConfigError(
            f"runs beside must generate the same semantic IDs, {fingerprint}, and {run_dir} "
            f"{'generates none' if table is None else f'was trained with {table.fingerprint}'}; leave it out"
        )
    return [{**line, "kind": "beside", "run": run_dir} for line in plain_beams(assembly, split=split)]


def _measure(
    assembly: Assembly, config: SearchConfig, split: str, number: int, prm: Assembly | None = None
) -> dict[str, Any]:
    configured = replace(assembly, config=replace(assembly.config, search=config))
    search = configured.search(prm=prm, recall_among=assembly.config.search.width)
    users = assembly.users(split)
    flops = _flops_per_user(search, configured, split)
    started = time.perf_counter()
    result = evaluate(
        search,
        users.batches(),
        empty_batch=users.empty_batch(),
        items=assembly.items,
        config=replace(assembly.config.evaluation, bootstrap_resamples=WITHOUT_INTERVALS),
        split=split,
    )
    seconds = time.perf_counter() - started
    return {
        "number": number,
        "gflop_per_user": flops / 1e9,
        "ms_per_user": 1000 * seconds / result.num_users,
        **result.metrics,
    }


def _flops_per_user(search: Search, assembly: Assembly, split: str) -> float:
    """Counted over the first batch of every rank: what its matrix products compute."""
    users = assembly.users(split)
    batch = next(iter(users.batches()), users.empty_batch())
    with FlopCounterMode(display=False) as counter:
        search.find(batch, k=1, rank_held_out=True, filter_seen=assembly.config.evaluation.filter_seen)
    totals = exchange_integers([counter.get_total_flops(), batch.num_users], assembly.process)
    return sum(flops for flops, _ in totals) / max(sum(count for _, count in totals), 1)


def render_scaling(lines: Sequence[dict[str, Any]], width: int) -> Group:
    """Tables under each other, of as many searches as stand side by side in a console of that width."""
    beside = max(1, (width - _METRIC_WIDTH) // _SEARCH_WIDTH)
    return Group(*(_table(lines[first : first + beside]) for first in range(0, len(lines), beside)))


def _table(lines: Sequence[dict[str, Any]]) -> Table:
    shown = [name for name in lines[0] if name.startswith(("recall@", "ndcg@", "hrecall"))]
    table = Table(title="Plain beams, and a PRM with more and more candidates; the number is the width or K+")
    table.add_column("metric", no_wrap=True)
    for line in lines:
        name = f"plain, {line['run']}" if line["kind"] == "beside" else line["kind"]
        table.add_column(f"{name}\n{line['number']}", justify="right", overflow="fold", min_width=6)
    table.add_row("GFLOP/user", *(f"{line['gflop_per_user']:.4f}" for line in lines))
    table.add_row("ms/user", *(f"{line['ms_per_user']:.1f}" for line in lines))
    for name in shown:
        table.add_row(name, *(f"{line[name]:.4f}" for line in lines))
    return table
