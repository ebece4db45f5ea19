"""Download a published data set from its owner, resumed and checked: grail data fetch NAME [--out DIR]"""

import difflib
from dataclasses import dataclass

from cluster.errors import ConfigError
from launch.options import parse, split_name
from launch.progress import start_console


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """Download a published data set from its owner; a broken download is resumed, and files are checked."""

    out: str | None = None
    """Folder the files are written to; left out, data/NAME."""


def run(arguments: list[str]) -> int:
    from data_streams.origins import origins

    name, options = split_name(arguments)
    known = origins()
    if name is None and {"-h", "--help"} & set(options):
        print(_overview(known))
        return 0
    if name not in known:
        raise ConfigError(
            f"grail data fetch needs the name of a data set in front of the options, got '{name or ''}'"
            f"{_nearest(name or '', known)} (all names: grail data fetch --help)"
        )
    parsed = parse(FetchOptions, options, program=f"grail data fetch {name}")
    source, origin = known[name]
    folder = parsed.out or f"data/{name}"
    if not origin.files:
        print(
            f"{name} cannot be downloaded by a program: {origin.by_hand}, and put the files into {folder}.\n"
            f"Its page: {origin.home}\nThen: {_next(source, folder, name)}"
        )
        return 1
    _fetch(origin, folder)
    print(f"\nTerms of use: {origin.home}\nNext: {_next(source, folder, name)}")
    return 0


def _nearest(name: str, known: dict) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def _fetch(origin, folder: str) -> None:
    from pathlib import Path

    from data_streams.fetch import fetch

    start_console()
    for fetched in fetch(origin, Path(folder)):
        checked = (
            f"checked against the {fetched.checked_against}"
            if fetched.checked_against
            else ("its owner publishes no checksum, so only its own was written down")
        )
        print(f"{folder}/{fetched.name}: {fetched.num_bytes:,} bytes, sha256 {fetched.sha256}; {checked}")


def _next(source: str, folder: str, name: str) -> str:
    return f"grail data build {source} --path {folder} --out shards/{name}"


def _overview(known: dict) -> str:
    lines = ["usage: grail data fetch NAME [--out DIR]", "", "Data sets by the source that reads them:"]
    for source in sorted({source for source, _ in known.values()}):
        names = [name for name, (reader, _) in known.items() if reader == source]
        lines += ["", source, *(f"  {name}" for name in names)]
    return "\n".join(lines)
