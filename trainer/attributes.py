"""The attributes of items and users that a run adds to their rows."""

from collections.abc import Mapping
from typing import Any

from cluster.errors import CheckpointError, ConfigError
from cluster.storage import Storage
from data_streams.attributes import item_attributes, user_attributes
from data_streams.configuration import DataConfig
from data_streams.manifest import Manifest
from models.recommender import Recommender
from models.tables import Attributes


def add_attributes(model: Recommender, data: DataConfig) -> None:
    """Let the tables of a model come with those of the attributes that are asked for.

    Raises: ConfigError where the model has no rows to add them to, or the data no such columns.
    """
    tables = model.tables()
    if data.item_attributes:
        if not any(spec.rows_are_items for spec in tables):
            raise ConfigError(
                f"data.item-attributes are added to rows of items, and {type(model).__name__} has none as it is "
                "configured; leave them out"
            )
        ids = item_attributes(data.path, sorted({*data.item_attributes}))
        model.item_attributes = Attributes(ids=ids, hash_rows=data.attribute_rows)
    if data.user_attributes:
        if not any(spec.rows_are_users for spec in tables):
            raise ConfigError(
                f"data.user-attributes are added to rows of users, and {type(model).__name__} has none as it is "
                "configured; give it some with its option user-rows where it has one, or leave them out"
            )
        num_users = Manifest.load(Storage(data.path)).num_users
        ids = user_attributes(data.path, sorted({*data.user_attributes}), num_users)
        model.user_attributes = Attributes(ids=ids, hash_rows=data.attribute_rows)


def described_attributes(data: DataConfig) -> dict[str, Any]:
    """What must stay the same for the rows of a checkpoint to mean the same."""
    chosen = {name: sorted({*getattr(data, name)}) for name in ("item_attributes", "user_attributes")}
    chosen = {name: columns for name, columns in chosen.items() if columns}
    return {**chosen, "attribute_rows": data.attribute_rows} if chosen else {}


def require_attributes(saved: Mapping[str, Any], data: DataConfig) -> None:
    """For a run that starts from the rows of another, `saved` as of `described_attributes`; further columns may come.

    Raises: CheckpointError where columns are left out: their rows were a part of those of items and users.
    """
    for name in ("item_attributes", "user_attributes"):
        missing = [column for column in saved.get(name, ()) if column not in getattr(data, name)]
        if missing:
            option = f"data.{name.replace('_', '-')}"
            raise CheckpointError(
                f"{option} must name the columns of the run this one starts from, whose rows were learnt with those of "
                f"their values, and lacks {', '.join(missing)}; give --{option} {' '.join(saved[name])}"
            )
