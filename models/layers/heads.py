"""Attention heads share the width of their layer."""

from cluster.errors import ConfigError


def checked_heads(num_heads: int, width: int) -> int:
    """The number of heads, if it divides the width. Raises: ConfigError."""
    if num_heads < 1 or width % num_heads:
        raise ConfigError(
            f"the width of an attention layer must be a multiple of the number of its heads; got a width of {width} "
            f"and {num_heads} heads; change one of them (options ending in width and num-heads)"
        )
    return num_heads
