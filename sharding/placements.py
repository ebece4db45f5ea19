"""Where table rows lie, for people to read."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class TablePlacement:
    """Where one table lies."""

    name: str
    num_rows: int
    dim: int
    kind: str
    """row_wise or table_wise; whole, where one process has all of it."""
    rows_per_rank: dict[int, int]
    """Rows of each rank that holds any."""


def render_plan(tables: Sequence[TablePlacement]) -> str:
    """The plan as a table for people, kept in the run directory."""
    table = Table(title="Where the table rows lie")
    for column in ("table", "rows", "dim", "placement", "rank: rows", "MiB per rank (rows + optimizer)"):
        table.add_column(column)
    for entry in tables:
        bytes_per_row = 4 * entry.dim + 4
        table.add_row(
            entry.name,
            f"{entry.num_rows:,}",
            str(entry.dim),
            entry.kind,
            ", ".join(f"{rank}: {rows:,}" for rank, rows in sorted(entry.rows_per_rank.items())),
            ", ".join(
                f"{rows * bytes_per_row / _MIB:.1f}" for _, rows in sorted(entry.rows_per_rank.items())
            ),
        )
    console = Console(width=110, record=True, file=open("/dev/null", "w"))
    console.print(table)
    return console.export_text()
