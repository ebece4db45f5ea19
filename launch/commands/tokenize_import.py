"""Take over published semantic IDs: grail tokenize import --sids FILE.parquet --data DIR --out DIR"""

from dataclasses import dataclass

from launch.options import parse
from launch.progress import start_console
from launch.semantic_id_tables import TableOptions, import_table


@dataclass(frozen=True, kw_only=True)
class ImportOptions(TableOptions):
    """Take over published semantic IDs."""

    sids: str
    """Parquet file with item_id and lists of codes, numbers or texts such as <b_70>."""
    column: str | None = None
    """Column of the lists; left out, the only one there is."""
    code_sizes: tuple[int, ...] = ()
    """Codes of each level; left out, 256, or as many as the largest code needs."""


def run(arguments: list[str]) -> int:
    options = parse(ImportOptions, arguments, program="grail tokenize import")
    start_console()
    import_table(options, sids=options.sids, column=options.column, code_sizes=options.code_sizes)
    return 0
