"""Build shards from raw events: grail data build SOURCE --out DIR [options]"""

from dataclasses import make_dataclass
from typing import Annotated

from cluster.errors import ConfigError
from cluster.plugins import first_line, load_plugin, plugin_config, plugin_files, suggestion
from launch.options import parse, split_name
from launch.progress import start_console

SOURCES = "data_streams.sources"


def run(arguments: list[str]) -> int:
    name, options = split_name(arguments)
    sources = plugin_files(SOURCES)
    if name is None and {"-h", "--help"} & set(options):
        print("usage: grail data build SOURCE --out DIR [options]\n\nsources:")
        width = max(map(len, sources)) + 2
        for source, path in sources.items():
            print(f"  {source:{width}}{first_line(path)}")
        print("\nAll options of a source: grail data build SOURCE --help")
        return 0
    if name is None or name not in sources:
        raise ConfigError(
            f"grail data build needs a source in front of the options, got '{name or ''}'"
            f"{suggestion(name or '', sources)}"
        )
    build_from(name, options)
    return 0


def build_from(name: str, options: list[str]) -> None:
    """Parse the options of a source and of the build together, then build."""
    import tyro

    from data_streams.build import BuildConfig, build

    flat = tyro.conf.arg(name="")
    form = make_dataclass(
        "Options",
        [
            ("source", Annotated[plugin_config(SOURCES, name), flat]),
            ("build", Annotated[BuildConfig, flat]),
        ],
        frozen=True,
        kw_only=True,
    )
    # What the help says in front of the options: which files a source wants, and where.
    form.__doc__ = load_plugin(SOURCES, name).__doc__
    parsed = parse(form, options, program=f"grail data build {name}")
    start_console()
    build(parsed.source, parsed.build)
    print(f"Next: grail data inspect {parsed.build.out}")
