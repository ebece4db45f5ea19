"""An object store over a local folder whose connection is slow, fails now and then, or breaks in mid-write.

Addresses are `faulty:///path`; importing this module makes them known.
"""

import random
import time
from collections.abc import Callable
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

BREAK_AFTER_BYTES = 1000


class FaultyStore(LocalFileSystem):
    """What goes wrong is set on the class, for the whole process."""

    protocol = "faulty"
    failure_rate = 0.0
    """Share of the operations that raise a ConnectionError, half of them after they have been done."""
    delay_s = 0.0
    breaks = 0
    """Streamed writes that are still to lose their connection."""
    failures = 0
    """How often something went wrong."""
    choice = random.Random(0)

    @classmethod
    def misbehave(cls, *, failure_rate: float = 0.0, delay_s: float = 0.0, breaks: int = 0, seed: int = 0):
        cls.failure_rate, cls.delay_s, cls.breaks = failure_rate, delay_s, breaks
        cls.failures, cls.choice = 0, random.Random(seed)

    def ls(self, path: str, **options: Any) -> Any:
        options.pop("refresh", None)
        return self._faulty(super().ls, path, **options)

    def exists(self, path: str, **options: Any) -> bool:
        return self._faulty(super().exists, path)

    def cat_file(self, path: str, **options: Any) -> bytes:
        return self._faulty(super().cat_file, path, **options)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        return self._faulty(self._put, path, value, **options)

    def rm(self, path: str, **options: Any) -> None:
        return self._faulty(super().rm, path, **options)

    def _put(self, path: str, value: bytes, mode: str = "overwrite") -> None:
        path = self._strip_protocol(path)
        self.makedirs(self._parent(path), exist_ok=True)
        with open(path, "xb" if mode == "create" else "wb") as file:
            file.write(value)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "w" not in mode:
            return super()._open(path, mode, **options)
        self.makedirs(self._parent(path), exist_ok=True)
        file = super()._open(path, mode, **options)
        return _BreakingFile(file) if self._breaks_now() else file

    def _breaks_now(self) -> bool:
        if FaultyStore.breaks <= 0:
            return False
        FaultyStore.breaks -= 1
        return True

    def _faulty(self, operation: Callable, *arguments: Any, **options: Any) -> Any:
        time.sleep(self.delay_s)
        fails, early = self.choice.random() < self.failure_rate, self.choice.random() < 0.5
        if fails and early:
            self._fail()
        result = operation(*arguments, **options)
        if fails:
            self._fail()
        return result

    @classmethod
    def _fail(cls) -> None:
        cls.failures += 1
        raise ConnectionResetError("the store has hung up")


class _BreakingFile:
    """A stream that takes some bytes and then loses its connection."""

    def __init__(self, file: Any):
        self.file, self.left = file, BREAK_AFTER_BYTES

    def __enter__(self) -> "_BreakingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.left -= len(data)
        if self.left < 0:
            FaultyStore._fail()
        return self.file.write(data)


fsspec.register_implementation("faulty", FaultyStore, clobber=True)
