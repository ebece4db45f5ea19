"""Attention heads share the width of their layer."""

from cluster.errors import ConfigError


def checked_heads(num_heads: int, width: int) -> int:
    """The number of heads, if it divides the width. Raises: ConfigError."""
    if num_heads < 1 or width % num_heads:
        raise ConfigError(
            f"attention heads share the width of their layer, so that it must be a multiple of them; got {num_heads} "
            f"heads and a width of {width}"
        )
    return num_heads
