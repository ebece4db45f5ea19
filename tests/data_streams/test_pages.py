"""Pages reconstructed from pauses, against a loop over the events."""

import numpy as np
import polars as pl
import pytest

from data_streams.pages import PageRule


def shown_and_chosen(seed):
    """Events sorted by user and time; some exposures are followed by a click at the same moment."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(6):
        time, tab = int(rng.integers(0, 100)), 0
        for _ in range(rng.integers(0, 12)):
            time += int(rng.choice([1, 5, 40]))
            tab = int(rng.integers(0, 2)) if rng.random() < 0.2 else tab
            rows.append((user, time, "exposure", tab))
            rows += [(user, time, "click", tab)] * int(rng.integers(0, 2))
    return pl.DataFrame(rows, schema=["user_id", "timestamp_s", "action", "tab"], orient="row")


@pytest.mark.parametrize("seed", range(4))
def test_a_pause_another_tab_and_another_user_begin_a_page(seed):
    events = shown_and_chosen(seed)
    expected, before, page, place = [], None, 0, -1
    for user, time, action, tab in events.rows():
        if before is None or before[0] != user:
            page, place = 0, -1
        elif action == "exposure" and (time - before[1] > 10 or tab != before[2]):
            page, place = page + 1, -1
        place += action == "exposure"
        expected.append((page, place))
        before = (user, time, tab)
    paged = PageRule(pause_s=10, columns=("tab",)).apply(events)
    assert paged.select("page_id", "position").rows() == expected
    assert len({page for page, _ in expected}) > 2


def test_choices_alone_tell_no_pages():
    events = shown_and_chosen(0).filter(pl.col("action") == "click")
    assert PageRule(pause_s=10, columns=("tab",)).apply(events).columns == events.columns
