"""The target pages of some users in NumPy form: jagged twice, pages of a user and items of a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_streams.jagged import gather_ranges, offsets_of


@dataclass(frozen=True, kw_only=True)
class PageTable:
    """Shapes: U users, P pages, E entries (an item of a page each)."""

    user_offsets: np.ndarray
    """[U + 1] int64, where the pages of each user begin."""
    history_lengths: np.ndarray
    """[P] int64, events of the user's history that lie before the page."""
    times_s: np.ndarray
    """[P] int64, when the page begins; -1 without times."""
    page_offsets: np.ndarray
    """[P + 1] int64, where the entries of each page begin."""
    entries: Mapping[str, np.ndarray]
    """[E] each: item, strength (how it was answered) and position (where it was shown, -1 if not known)."""

    @staticmethod
    def empty(num_users: int) -> "PageTable":
        """These users, without any page."""
        nothing = np.zeros(0, dtype=np.int64)
        return PageTable(
            user_offsets=np.zeros(num_users + 1, dtype=np.int64),
            history_lengths=nothing,
            times_s=nothing,
            page_offsets=np.zeros(1, dtype=np.int64),
            entries={"item": nothing, "strength": nothing, "position": nothing},
        )

    @property
    def num_pages(self) -> int:
        return len(self.history_lengths)

    @property
    def num_users(self) -> int:
        return len(self.user_offsets) - 1

    def take(self, users: np.ndarray) -> "PageTable":
        """The pages of these users, in this order. Shapes: users [n] places in this table."""
        counts = np.diff(self.user_offsets)[users]
        return self._pages(gather_ranges(self.user_offsets[users], counts), offsets_of(counts))

    def within(self, starts: np.ndarray, lengths: np.ndarray) -> "PageTable":
        """Pages as histories see them that hold only the events start..start + length of each user.

        Pages that are left without a history are left out. A history that ends too early for a page (its last
        event is the one to be predicted) is all there is before it. Shapes: [U] each.
        """
        users = np.repeat(np.arange(self.num_users), np.diff(self.user_offsets))
        seen = np.minimum(self.history_lengths - starts[users], lengths[users])
        kept = seen > 0
        counts = np.bincount(users[kept], minlength=self.num_users)
        pages = self._pages(np.flatnonzero(kept), offsets_of(counts))
        return PageTable(**{**vars(pages), "history_lengths": seen[kept]})

    def _pages(self, pages: np.ndarray, user_offsets: np.ndarray) -> "PageTable":
        sizes = np.diff(self.page_offsets)[pages]
        index = gather_ranges(self.page_offsets[pages], sizes)
        return PageTable(
            user_offsets=user_offsets,
            history_lengths=self.history_lengths[pages],
            times_s=self.times_s[pages],
            page_offsets=offsets_of(sizes),
            entries={name: column[index] for name, column in self.entries.items()},
        )


def concatenate(tables: Sequence[PageTable]) -> PageTable:
    """The users of all tables behind each other."""
    join = lambda name: np.concatenate([getattr(table, name) for table in tables])  # noqa: E731
    lengths = lambda name: np.concatenate([np.diff(getattr(table, name)) for table in tables])  # noqa: E731
    return PageTable(
        user_offsets=offsets_of(lengths("user_offsets")),
        history_lengths=join("history_lengths"),
        times_s=join("times_s"),
        page_offsets=offsets_of(lengths("page_offsets")),
        entries={
            name: np.concatenate([table.entries[name] for table in tables]) for name in tables[0].entries
        },
    )
