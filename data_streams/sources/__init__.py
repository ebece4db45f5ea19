"""Sources turn one raw format each into the schema; a file here is one, and its Config names its options."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from data_streams.pages import PageRule


@dataclass(frozen=True, kw_only=True)
class Part:
    """A portion of a source that one task reads by itself; the parts in order are the whole source."""

    name: str
    """What the rows are taken from, such as a file."""
    start: int = 0
    """First row (of a text file: byte; or user, where a source makes its events user by user)."""
    stop: int | None = None
    """First one after the part; None reads to the end."""


class Source(ABC):
    """Reads events in the form of `data_streams.schema`, in bounded batches and in parts."""

    @abstractmethod
    def describe(self) -> Mapping[str, Any]:
        """Name and options, as plain JSON values for the manifest."""

    @abstractmethod
    def parts(self) -> list[Part]:
        """How the events can be read side by side, in the source's order."""

    @abstractmethod
    def estimate_num_events(self) -> int:
        """About how many events there are, known without reading them."""

    @abstractmethod
    def read(self, part: Part) -> Iterator[pl.DataFrame]:
        """The events of a part, batch by batch, in the source's order."""

    def items(self) -> pl.DataFrame | None:
        """Every item with item_id, title and categories; None takes the items from the events."""
        return None

    def takes_items_of_events(self) -> bool:
        """Whether items that occur in events but not in `items` join the catalogue, called by their ids."""
        return False

    def users(self) -> pl.DataFrame | None:
        """Profiles by user_id; None where nothing is known but the events."""
        return None

    def embeddings(self) -> np.ndarray | None:
        """[N, E] vectors in the order of `items`, read lazily from disk; None without any."""
        return None

    def sequence_actions(self) -> tuple[str, ...]:
        """Actions that make up a sequence unless a build says otherwise; empty means all but exposures."""
        return ()

    def page_rule(self) -> PageRule | None:
        """How pages are told apart where the log does not name them; None leaves the events as they are."""
        return None
