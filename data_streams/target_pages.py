"""Which events of a log are a user's history, and which make up the pages that are to be predicted.

The history holds what a user chose. What lies beside the sequence (exposures and the actions named by --page-actions)
belongs to pages only, unless data.history-exposures is set. A page is what one request showed: by `page_id` where the
data set has it, else RECONSTRUCTED by pauses or by a number of events.
"""

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.errors import ConfigError
from cluster.user_draws import uniform_of_events
from data_streams.batch import CLICKED, EXPOSED, ORDERED
from data_streams.configuration import DataConfig
from data_streams.held_out_windows import in_held_out_windows
from data_streams.jagged import offsets_of
from data_streams.manifest import Manifest
from data_streams.page_table import PageTable
from data_streams.schema import EXPOSURE
from data_streams.shards import Chunk

logger = logging.getLogger(__name__)

ReadFor = Literal["train", "valid", "test", "serve"]
NO_PAGE = -1


class EventReading:
    """Takes the chunks of one data set apart into histories and pages."""

    def __init__(self, manifest: Manifest, config: DataConfig, read_for: ReadFor):
        """Raises: ConfigError where the data set cannot give the pages or the lag that are asked for."""
        self._config, self._read_for, self._manifest = config, read_for, manifest
        self._beside = [] if config.history_exposures else manifest.beside_codes()
        evaluates = EXPOSURE in manifest.actions and "page_id" in manifest.columns
        drops = evaluates and config.history_exposures and read_for == "train"
        self._exposure = manifest.actions.index(EXPOSURE) if drops else None
        self._strength = np.array([_strength(name, config) for name in manifest.actions], dtype=np.int8)
        self.pages_from = _pages_from(manifest, config) if read_for != "serve" else "none"
        if self.has_lag and "timestamp_s" not in manifest.columns:
            raise ConfigError(
                f"data.feedback-lag-s needs events with timestamp_s, and {config.path} holds "
                f"{', '.join(sorted(manifest.columns)) or 'none'}; leave it out, or build the data with times"
            )
        self.counters: Counter[str] = Counter()
        """Pages met so far, and why some are no targets."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Event columns that must be read beside those the model asks for."""
        has_pages, known = self.pages_from != "none", self._manifest.columns
        wanted = ("action", "page_id", "position", "timestamp_s") if has_pages else ()
        shown = ("action", "page_id") if self._exposure is not None else ()
        needed = (*(("action",) if self._beside else ()), *shown, *(("timestamp_s",) if self.has_lag else ()))
        return tuple(name for name in dict.fromkeys((*needed, *wanted)) if name in known)

    @property
    def has_pages(self) -> bool:
        return self.pages_from != "none"

    @property
    def _draws_pages(self) -> bool:
        """Whether pages by count are cut by chance; the page of a held-out event is told by its place alone."""
        is_drawn = self.pages_from == "count" and self._config.page_borders == "drawn"
        return is_drawn and self._read_for == "train"

    @property
    def has_lag(self) -> bool:
        """Whether histories end some time before the held-out event."""
        return self._config.feedback_lag_s > 0 and self._read_for in ("valid", "test")

    @property
    def drops_events(self) -> bool:
        """Whether histories are shorter than what the manifest counts."""
        return bool(self._beside)

    def log_pages(self) -> None:
        """Say where pages come from."""
        config = self._config
        how = {
            "recorded": "recorded by the data set (page_id)",
            "gap": f"synthesised: a pause of more than {config.page_gap_s:g} s begins a new one",
            "count": f"synthesised: {config.page_events} events that follow each other",
            "drawn": f"synthesised anew in each epoch: {config.page_events} events that follow each other in the mean",
        }
        if self.has_pages:
            cut = "drawn" if self._draws_pages else self.pages_from
            logger.info("Target pages are %s; at most %d items each", how[cut], config.page_items)

    def history(self, chunk: Chunk) -> Chunk:
        """The chunk as if it held nothing beside the sequences; in training, no exposures that evaluate a model."""
        if not self._beside and self._exposure is None:
            return chunk
        kept = self._in_history(chunk)
        if self._exposure is not None:
            is_exposure = chunk.columns["action"] == self._exposure
            # One without a page has no answer that is known to be its own.
            kept &= ~is_exposure | (
                ~in_held_out_windows(chunk, is_exposure) & (chunk.columns["page_id"] >= 0)
            )
        upto = np.concatenate([[0], np.cumsum(kept)])
        offsets = upto[chunk.offsets]
        borders = np.stack([chunk.train_end, chunk.valid_at, chunk.test_at])
        moved = upto[chunk.offsets[:-1] + np.maximum(borders, 0)] - offsets[:-1]
        train_end, valid_at, test_at = np.where(borders < 0, borders, moved)
        return Chunk(
            users=chunk.users,
            offsets=offsets,
            train_end=train_end,
            valid_at=valid_at,
            test_at=test_at,
            items=chunk.items[kept],
            columns={name: column[kept] for name, column in chunk.columns.items()},
        )

    def known_events(self, chunk: Chunk, held_out: np.ndarray) -> np.ndarray:
        """How many events of each user are known when the held-out one is to be ranked.

        Shapes: held_out [U] place of the event, -1 or 0 for none -> [U] int64.
        """
        known = np.maximum(held_out, 0).astype(np.int64)
        if not self.has_lag or not chunk.num_events:
            return known
        user, times = chunk.user_index, chunk.columns["timestamp_s"]
        # Where none is held out, nothing is known anyway.
        limits = times[np.minimum(chunk.offsets[:-1] + known, len(times) - 1)] - self._config.feedback_lag_s
        in_time = (chunk.places < known[user]) & (times < limits[user])
        return np.bincount(user[in_time], minlength=chunk.num_users)

    def pages(self, chunk: Chunk, seed: int = 0) -> PageTable | None:
        """The pages of all users of a chunk: those of the training span, or those of the held-out events.

        `seed` belongs to the epoch and draws where training cuts them.
        """
        if not self.has_pages:
            return None
        span = self._span(chunk, seed)
        return cut_pages(
            chunk,
            span,
            in_history=self._in_history(chunk),
            strength=self._strengths(chunk),
            max_items=self._config.page_items,
            counters=self.counters,
        )

    def _in_history(self, chunk: Chunk) -> np.ndarray:
        if not self._beside:
            return np.ones(chunk.num_events, dtype=bool)
        return ~np.isin(chunk.columns["action"], self._beside)

    def _strengths(self, chunk: Chunk) -> np.ndarray:
        if "action" not in chunk.columns:
            return np.full(chunk.num_events, CLICKED, dtype=np.int8)
        return self._strength[chunk.columns["action"]]

    def _span(self, chunk: Chunk, seed: int) -> "PageSpan":
        user, within = chunk.user_index, chunk.places
        held_out, stops = None, chunk.train_end.astype(np.int64)
        if self._read_for == "valid":
            held_out, stops = (
                chunk.valid_at,
                np.where(chunk.test_at > chunk.valid_at, chunk.test_at, chunk.lengths),
            )
        elif self._read_for == "test":
            held_out, stops = chunk.test_at, chunk.lengths
        border = stops if held_out is None else held_out
        page = self._page_numbers(chunk, user, within, border, seed)
        if held_out is not None:
            at = np.append(page, NO_PAGE)[
                np.where(held_out < 0, chunk.num_events, chunk.offsets[:-1] + held_out)
            ]
            page = np.where(page == at[user], page, NO_PAGE)
        return PageSpan(user=user, within=within, page=page, stops=stops)

    def _page_numbers(
        self, chunk: Chunk, user: np.ndarray, within: np.ndarray, border: np.ndarray, seed: int
    ) -> np.ndarray:
        """Page of each event within its user, NO_PAGE for none; fixed pages by count are counted from `border` [U].

        The first event of a user lies in no synthesised page: something must be the history.
        """
        if self.pages_from == "recorded":
            return chunk.columns["page_id"].astype(np.int64)
        size = self._config.page_events
        if self._draws_pages:
            page = _numbered(uniform_of_events(seed, chunk.users[user], within) < 1 / size, chunk)
        elif self.pages_from == "count":
            page = (within - border[user]) // size + chunk.lengths[user] // size + 1
        else:
            times = chunk.columns["timestamp_s"]
            page = _numbered(np.diff(times, prepend=times[:1]) > self._config.page_gap_s, chunk)
        return np.where(within == 0, NO_PAGE, page)


def _numbered(begins: np.ndarray, chunk: Chunk) -> np.ndarray:
    """Number of the page of each event within its user, from the events that begin one. Shapes: [T] bool -> [T]."""
    upto = np.cumsum(begins)
    return upto - np.append(upto, 0)[chunk.offsets[:-1]][chunk.user_index]


@dataclass(frozen=True, kw_only=True)
class PageSpan:
    """Events of U users on their way to pages. Shapes: T events."""

    user: np.ndarray
    """[T] place of the user in the chunk."""
    within: np.ndarray
    """[T] place of the event in its user's sequence."""
    page: np.ndarray
    """[T] number of the page within the user, NO_PAGE for none; later pages have larger numbers."""
    stops: np.ndarray
    """[U] place of the first event that must not be known."""


def cut_pages(
    chunk: Chunk,
    span: PageSpan,
    *,
    in_history: np.ndarray,
    strength: np.ndarray,
    max_items: int,
    counters: Counter[str],
) -> PageTable:
    """Gather events into pages: an item once, as strongly as it was answered, stronger ones first.

    Of a page that goes on beyond the span only chosen items are kept: what was shown may still be chosen. Pages
    without a chosen item, or without a history before them, are no targets and counted.

    Shapes: in_history and strength [T].
    """
    event = np.flatnonzero(span.page >= 0)
    if not len(event):
        return PageTable.empty(chunk.num_users)
    key = span.user[event] * (span.page.max() + 1) + span.page[event]
    _, first, number = np.unique(key, return_index=True, return_inverse=True)
    begin = event[first]
    beyond = span.within[event] >= span.stops[span.user[event]]
    goes_on = np.zeros(len(begin), dtype=bool)
    goes_on[number[beyond]] = True
    known = ~beyond & ~(goes_on[number] & (strength[event] == EXPOSED))
    page, entries = _entries(chunk, event[known], number[known], strength)
    chosen = np.bincount(page, weights=entries["strength"] > EXPOSED, minlength=len(begin)) > 0
    before = np.concatenate([[0], np.cumsum(in_history)])
    users = span.user[begin]
    history_lengths = before[begin] - before[chunk.offsets[users]]
    kept = chosen & (history_lengths > 0)
    sizes = np.bincount(page, minlength=len(begin))
    counters.update(
        pages=len(begin),
        pages_without_target=int((~chosen).sum()),
        pages_without_history=int((chosen & ~kept).sum()),
        page_items_cut=int(np.maximum(sizes[kept] - max_items, 0).sum()),
    )
    place = np.arange(len(page)) - offsets_of(sizes)[page]
    stays = kept[page] & (place < max_items)
    times = chunk.columns.get("timestamp_s", np.full(chunk.num_events, -1))
    return PageTable(
        user_offsets=offsets_of(np.bincount(users[kept], minlength=chunk.num_users)),
        history_lengths=history_lengths[kept],
        times_s=times[begin[kept]].astype(np.int64),
        page_offsets=offsets_of(np.minimum(sizes[kept], max_items)),
        entries={name: column[stays] for name, column in entries.items()},
    )


def _entries(
    chunk: Chunk, event: np.ndarray, page: np.ndarray, strength: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The distinct items of each page in their order -> page [E], entries [E] each.

    Ordered before clicked before only exposed; then by position, items without one behind, then by time.
    """
    item = chunk.items[event].astype(np.int64)
    key = page * (item.max(initial=0) + 1) + item
    _, first, number = np.unique(key, return_index=True, return_inverse=True)
    strongest = np.full(len(first), EXPOSED, dtype=np.int64)
    np.maximum.at(strongest, number, strength[event])
    position = np.full(len(first), np.iinfo(np.int64).max)
    if "position" in chunk.columns:
        places = chunk.columns["position"][event].astype(np.int64)
        np.minimum.at(position, number[places >= 0], places[places >= 0])
    order = np.lexsort((first, position, -strongest, page[first]))
    entries = {
        "item": item[first],
        "strength": strongest,
        "position": np.where(position == np.iinfo(np.int64).max, -1, position),
    }
    return page[first][order], {name: column[order] for name, column in entries.items()}


def _strength(action: str, config: DataConfig) -> int:
    if action == "exposure" or action in config.page_disliked:
        return EXPOSED
    return ORDERED if action in config.page_ordered else CLICKED


def _pages_from(manifest: Manifest, config: DataConfig) -> str:
    """How pages come about, once it is known what the data set holds."""
    for name, least in (("feedback_lag_s", 0), ("page_gap_s", 0), ("page_events", 1), ("page_items", 1)):
        if getattr(config, name) < least:
            option = f"data.{name.replace('_', '-')}"
            raise ConfigError(f"{option} must be at least {least}, is {getattr(config, name)}")
    needed = {"recorded": "page_id", "gap": "timestamp_s"}
    if config.pages != "auto":
        column = needed.get(config.pages)
        if column is not None and column not in manifest.columns:
            raise ConfigError(
                f"data.pages {config.pages} needs events with {column}, and {config.path} holds "
                f"{', '.join(sorted(manifest.columns)) or 'none'}; say --data.pages count to make pages up from "
                "the order of events, or build the data from a source that has them"
            )
        return config.pages
    return next((how for how, column in needed.items() if column in manifest.columns), "count")
