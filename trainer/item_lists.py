"""Allow and deny lists of `SearchConfig`: which items any search may find."""

from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from cluster.errors import ConfigError, DataError
from data_streams.item_table import ItemTable
from data_streams.semantic_ids import named
from trainer.configuration import SearchConfig


def allowed_rows(config: SearchConfig, items: ItemTable) -> Tensor | None:
    """Item rows [n] int64 in ascending order; None where there are no lists.

    Raises: ConfigError for a list that is no file, or where no item is left; DataError for ids that are no items.
    """
    if not config.allow and not config.deny:
        return None
    allowed = np.ones(items.num_items, dtype=bool)
    if config.allow:
        allowed = _listed("allow", config.allow, items)
    if config.deny:
        allowed &= ~_listed("deny", config.deny, items)
    if not allowed.any():
        raise ConfigError(
            f"search.allow and search.deny must leave at least one of the {items.num_items} items, and they leave "
            "none; shorten the deny list, or lengthen the allow list"
        )
    return torch.from_numpy(np.flatnonzero(allowed))


def _listed(name: str, path: str, items: ItemTable) -> np.ndarray:
    """Shapes: [N] bool."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"search.{name} must be a text file of item ids, one a line: {error}") from error
    wanted = pl.Series("item_id", [line.strip() for line in lines if line.strip()], dtype=pl.String)
    known = items.item_ids.cast(pl.String)
    unknown = wanted.filter(~wanted.is_in(known.implode()))
    if len(unknown):
        raise DataError(
            f"{path} must hold ids of the data set's items, and {named(unknown)} are none of them; take them out, or "
            "give the list of this catalogue"
        )
    return known.is_in(wanted.implode()).to_numpy()
