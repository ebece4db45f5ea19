"""The truth about a data set, where it was built from the synthetic world."""

from typing import TYPE_CHECKING

from cluster.storage import Storage

if TYPE_CHECKING:
    from data_streams.world_truth import WorldTruth

MOMENTS = {
    ("leave-last-out", "valid"): "validation",
    ("leave-last-out", "test"): "test",
    ("leave-one-out", "valid"): "test",
    ("leave-one-out", "test"): "test",
}
"""When the users' states are those under which the held-out click was made."""


def load_truth(data_path: str, split: str) -> "WorldTruth | None":
    """None for other data, and for splits whose held-out events belong to no moment the world remembers."""
    from data_streams.item_table import ItemTable
    from data_streams.manifest import Manifest
    from data_streams.world import World
    from data_streams.world_truth import WorldTruth
    from launch.jobs import user_ids

    manifest = Manifest.load(Storage(data_path))
    moment = MOMENTS.get((manifest.split["name"], split))
    if manifest.source.get("name") != "world" or moment is None:
        return None
    return WorldTruth(
        world=World.from_source(manifest.source),
        user_ids=user_ids(data_path).to_numpy(),
        item_ids=ItemTable.load(data_path).item_ids.to_numpy(),
        moment=moment,
    )
