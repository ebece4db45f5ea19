"""Where a data set comes from: the addresses its owner publishes it at, and what has to be done by hand.

A file of `data_streams/sources` that has `ORIGINS` names what `grail data fetch` can get for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from cluster.plugins import discover

RECORD_NAME = "fetched.json"
"""Written beside the files of a data set: where each came from, and its checksum."""


@dataclass(frozen=True, kw_only=True)
class OriginFile:
    """One file to be downloaded."""

    address: str
    checksum_address: str | None = None
    """Where the owner publishes the file's MD5 or SHA-256; None where none is published."""

    @property
    def name(self) -> str:
        return self.address.partition("?")[0].rsplit("/", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A data set at its owner's."""

    name: str
    """What it is called on the command line."""
    home: str
    """Page of the owner with the terms of use, which hold for whoever downloads."""
    files: tuple[OriginFile, ...] = ()
    by_hand: str = ""
    """What a person has to do where the owner asks for more than a download."""


def origins() -> dict[str, tuple[str, Origin]]:
    """Name of a data set -> name of the source that reads it, and its origin."""
    return {
        origin.name: (source, origin)
        for source, module in discover("data_streams.sources").items()
        for origin in _origins_of(module)
    }


def _origins_of(module: ModuleType) -> Iterator[Origin]:
    yield from vars(module).get("ORIGINS", ())
