"""How training and evaluation read a data set that was built into shards."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
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
    columns: tuple[str, ...] = ()
    """Event columns a model needs beside the item, such as timestamp_s or action."""
