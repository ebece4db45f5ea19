"""Pages that a log does not tell, RECONSTRUCTED from the pauses between what a user was shown."""

from dataclasses import dataclass

import polars as pl

from data_streams import schema


@dataclass(frozen=True, kw_only=True)
class PageRule:
    """A page ends with a longer pause, and where one of the columns changes."""

    pause_s: float
    """Seconds without an exposure after which a new page begins."""
    columns: tuple[str, ...] = ()
    """Event columns that are equal throughout a page, such as the tab of an app."""

    def apply(self, events: pl.DataFrame) -> pl.DataFrame:
        """Add page_id, counted within each user, and position, the place among the exposures of the page.

        `events` are sorted by user and time and have `timestamp_s`; an action follows the exposure it
        answers. Nothing is added where there are no exposures, since the pauses between chosen items alone
        say nothing about what was shown together.
        """
        exposed = pl.col("action") == schema.EXPOSURE
        if not events.select(exposed.any()).item():
            return events
        pause = pl.col("timestamp_s").diff().over("user_id").fill_null(0)
        changes = [pl.col(name).ne_missing(pl.col(name).shift()) for name in self.columns]
        later = pl.col("user_id") == pl.col("user_id").shift()
        begins = (later & exposed & pl.any_horizontal(pause > self.pause_s, *changes)).fill_null(False)
        paged = events.with_columns(page_id=begins.cast(pl.Int64).cum_sum().over("user_id"))
        place = (exposed.cast(pl.Int32).cum_sum().over("user_id", "page_id") - 1).clip(0)
        return paged.with_columns(position=place)
