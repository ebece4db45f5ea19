"""Print and plot what is in a data set, checking every chunk: grail data inspect DIR"""

from dataclasses import dataclass
from typing import Annotated

from launch.options import parse
from launch.progress import start_console


def run(arguments: list[str]) -> int:
    import tyro

    from data_streams.inspect import inspect, print_report

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Print and plot what is in a data set, checking every chunk."""

        path: Annotated[str, tyro.conf.Positional]
        """Folder or address of the shards."""
        samples: int = 3
        """Users whose history is shown with titles."""

    options = parse(Options, arguments, program="grail data inspect")
    start_console()
    print_report(inspect(options.path, options.samples))
    return 0
