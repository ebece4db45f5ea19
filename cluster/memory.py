"""How this process asks the system for memory."""

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
"""Options of glibc's mallopt."""
_NEVER = -1
_GROWTH_BYTES = 64 * 2**20


def keep_freed_memory() -> None:
    """Let the C library keep the memory of large tensors for the next ones.

    By default it gives blocks of more than 32 MiB back to the system as soon as they are freed, and each step pays for
    fresh pages anew: a third of a step of `promise-amazon`. The process stays as large as it was at its largest.
    Nothing happens where the C library is not glibc.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _GROWTH_BYTES)):
        set_option(option, value)
