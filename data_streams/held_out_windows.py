"""Which exposures evaluate a model of answers: those around the page of a held-out event."""

from typing import Literal

import numpy as np

from data_streams.shards import Chunk


def held_out_window(
    chunk: Chunk, split: Literal["valid", "test"], is_exposure: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The last answer before the page of the held-out event began, and the end of that page, by place within the user.

    A window holds the exposures between the two, and is empty where nothing is held out, or what is lies on no page.
    Answers are all events but exposures.

    Shapes: is_exposure [T] -> twice [U] int64.
    """
    user, within = chunk.user_index, chunk.places
    page = chunk.columns["page_id"]
    held_out = {"valid": chunk.valid_at, "test": chunk.test_at}[split].astype(np.int64)
    target = np.where(held_out >= 0, page[chunk.offsets[:-1] + np.maximum(held_out, 0)], -1)
    on_page = (page == target[user]) & (page >= 0)
    begin, stop = chunk.lengths.astype(np.int64), np.zeros(chunk.num_users, dtype=np.int64)
    np.minimum.at(begin, user[on_page], within[on_page])
    np.maximum.at(stop, user[on_page], within[on_page] + 1)
    # Pages may overlap: what was answered while this one was open is not known to all of it.
    before = ~is_exposure & ~on_page & (within < begin[user])
    start = np.full(chunk.num_users, -1)
    np.maximum.at(start, user[before], within[before])
    return start, stop


def between(chunk: Chunk, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Which events lie in the window of their user, without `start` and `stop`. Shapes: twice [U] -> [T] bool."""
    user, within = chunk.user_index, chunk.places
    return (within > start[user]) & (within < stop[user])


def in_held_out_windows(chunk: Chunk, is_exposure: np.ndarray) -> np.ndarray:
    """Which exposures no model may be trained on: those of both splits' windows. Shapes: [T] -> [T] bool."""
    valid, test = (between(chunk, *held_out_window(chunk, split, is_exposure)) for split in ("valid", "test"))
    return is_exposure & (valid | test)
