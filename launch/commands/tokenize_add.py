"""Add the new items of a data set to a table: grail tokenize add TABLE --data DIR --out DIR [options]"""

from dataclasses import dataclass, field
from typing import Annotated

from launch.item_embeddings import EmbeddingSources
from launch.options import parse
from launch.progress import start_console
from launch.semantic_id_tables import TableOptions, extend_table


def run(arguments: list[str]) -> int:
    import tyro

    @dataclass(frozen=True, kw_only=True)
    class Options(TableOptions):
        """Add the new items of a data set to a table, whose items keep their codes."""

        table: Annotated[str, tyro.conf.Positional]
        """Folder of the table."""
        embeddings: EmbeddingSources = field(default_factory=EmbeddingSources)

    options = parse(Options, arguments, program="grail tokenize add")
    start_console()
    extend_table(options.table, options, options.embeddings)
    return 0
