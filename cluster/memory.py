"""How this process asks the system for memory."""

import ctypes
import resource
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
"""Options of glibc's mallopt."""
_NEVER = -1
_GROWTH_BYTES = 64 * 2**20
_STATM = Path("/proc/self/statm")


def keep_freed_memory() -> None:
    """Let the C library keep the memory of large tensors for the next ones.

    By default it gives blocks of more than 32 MiB back to the system as soon as they are freed, and each step pays for
    fresh pages anew: a third of a step of `promise-amazon`. The process stays as large as it was at its largest, and
    grows beyond that where tensors of ever other sizes leave gaps: see `FreedMemory`.
    Nothing happens where the C library is not glibc.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _GROWTH_BYTES)):
        set_option(option, value)


class FreedMemory:
    """Gives kept memory back to the system whenever the process has grown to several times what it needs.

    That and the fresh pages afterwards cost most of a second per GiB (measured with `promise-amazon`), so that it must
    be rare.
    """

    def __init__(self, growth: float = 3.0):
        self.growth = growth
        self._needed_bytes: int | None = None
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def give_back_excess(self) -> None:
        """To be called now and then between steps, when what they computed is freed."""
        if self._trim is None:
            return
        if self._needed_bytes is None or resident_bytes() > self.growth * self._needed_bytes:
            self._trim(0)
            self._needed_bytes = resident_bytes()


def resident_bytes() -> int:
    """Memory of this process that lies in RAM."""
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()
