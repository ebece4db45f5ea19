"""How many workers a gang may have."""

from collections.abc import Sequence

from cluster.configuration import ClusterConfig
from cluster.errors import ConfigError


def allowed_worlds(config: ClusterConfig, *, multiple_of: int = 1) -> list[int]:
    """Numbers of workers a gang may have, rising; one number where the gang is not elastic.

    `multiple_of` must divide the number, as the size of an expert-parallel group must. Whether the plan works with
    so many shows when they start.

    Raises: ConfigError if the limits contradict each other or leave no number.
    """
    least = config.workers if config.min_workers is None else config.min_workers
    most = config.workers if config.max_workers is None else config.max_workers
    if not 1 <= least <= config.workers <= most:
        raise ConfigError(
            "cluster.min-workers must be at least 1 and at most cluster.workers, and cluster.max-workers at "
            f"least that; got {least}, {config.workers} and {most}"
        )
    worlds = [size for size in range(least, most + 1) if size % multiple_of == 0]
    if not worlds:
        raise ConfigError(
            f"no number of workers from cluster.min-workers {least} to cluster.max-workers {most} is a multiple "
            f"of {multiple_of}; change the limits"
        )
    return worlds


def largest_world(worlds: Sequence[int], room: int) -> int | None:
    """The largest of the rising numbers that is at most `room`; None where even the smallest is not."""
    return max((size for size in worlds if size <= room), default=None)
