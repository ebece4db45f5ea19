"""How training and evaluation read a data set that was built into shards."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which shards are read, how far back a history goes, and what a step is made of."""

    path: str = ""
    """Folder or address of the shards (`grail data build` makes them)."""
    semantic_ids: str = ""
    """Folder of the table of semantic IDs (`grail tokenize` makes it), for models that generate them."""
    max_length: int = 50
    """Most history events of a user a model sees; older ones are cut off, counted and logged."""
    tokens_per_step: int = 1024
    """History events of one optimizer step over all workers."""
    num_streams: int = 8
    """Canonical streams the users are dealt to: a property of the run, at least the number of workers."""
    shuffle_chunks: int = 8
    """Chunks of a stream whose users are shuffled together."""
    prefetch_steps: int = 4
    """Steps read ahead in the background."""
    on_bad_shard: Literal["fail", "skip"] = "fail"
    """What a damaged or missing chunk does: end the run with its name, or be counted and logged."""
    feedback_lag_s: float = 0.0
    """Seconds before a held-out event that its history lacks in evaluation, as where feedback comes in late."""
    history_exposures: bool = False
    """Let exposures, and other actions kept beside the sequence, be part of the history: for models of how users answer
    what they are shown."""
    pages: Literal["none", "auto", "recorded", "gap", "count"] = "none"
    """Target pages for models that predict whole pages: recorded ones (page_id), or made up by a pause (gap) or of some
    events each (count); auto takes the first of these that the data set allows."""
    page_gap_s: float = 900.0
    """Seconds between two events after which a page made up by gap ends."""
    page_events: int = 5
    """Events of a page made up by count, counted back from the end of the training span."""
    page_borders: Literal["fixed", "drawn"] = "fixed"
    """Where training cuts pages made up by count: after as many events each, or anew in every epoch, where any event
    begins a page with a chance of 1 / page-events."""
    page_items: int = 10
    """Most items of a page; the least chosen ones are cut off."""
    page_ordered: tuple[str, ...] = ("purchase", "order")
    """Actions that stand above a click in the order of a page's items."""
    page_disliked: tuple[str, ...] = ("hate", "dislike")
    """Actions that leave an item of a page what it was without them: shown, and not chosen."""
    item_attributes: tuple[str, ...] = ()
    """Columns of the item table (brand, categories, price) whose values have rows of their own, which are added to the
    items' rows in every model that has such."""
    user_attributes: tuple[str, ...] = ()
    """The same of the user table, for models with rows of users (user-rows)."""
    attribute_rows: int = 65536
    """Rows of the hashed table that the values of all those columns share; one for items, one for users."""
    columns: tuple[str, ...] = ()
    """Event columns a model needs beside the item, such as timestamp_s or action."""
