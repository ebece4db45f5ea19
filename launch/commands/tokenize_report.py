"""Compare semantic ID tables, one column each: grail tokenize report DIR DIR ... [--out FILE.png]"""

from dataclasses import dataclass
from typing import Annotated

from cluster.errors import ConfigError
from cluster.storage import Storage
from launch.options import parse
from launch.run_directory import folder_and_name, require_ending
from launch.semantic_id_tables import show_reports


def run(arguments: list[str]) -> int:
    import tyro

    from data_streams.semantic_id_report import SemanticIdReport

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Compare semantic ID tables, one column each."""

        tables: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR ...")]
        """Folders of tables."""
        out: str | None = None
        """Picture (.png) to draw them into."""

    options = parse(Options, arguments, program="grail tokenize report")
    if not options.tables:
        raise ConfigError(
            "grail tokenize report needs the folder of a table at least, and got none; name some"
        )
    if options.out:
        require_ending(options.out, ".png", "--out")
    reports = [SemanticIdReport.load(Storage(path)) for path in options.tables]
    folder, name = folder_and_name(options.out) if options.out else (None, "")
    show_reports(reports, Storage(folder) if folder else None, name)
    return 0
