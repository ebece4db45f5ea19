"""Files of a run or a data set under one root: a local directory or any fsspec address."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import IOBase
from pathlib import Path

import fsspec

from cluster.errors import ConfigError
from cluster.retries import retried


class Storage:
    """Reads and writes whole files below one root; a file is there entirely or not at all.

    Local writes go to a temporary name, are flushed to disk and renamed. Object stores put a file in one step;
    what the network loses on the way to them is asked for again, but for `open_write`.

    Raises: StorageError where a store does not answer for long; ConfigError for an address nothing here reads.
    """

    def __init__(self, root: str | Path):
        self.address = str(root)
        self.filesystem, self.root = _open_filesystem(self.address)
        self.is_local = "file" in _protocols(self.filesystem)

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def folder(self, name: str) -> "Storage":
        """The files below a folder of this one."""
        return Storage(f"{self.address.rstrip('/')}/{name}")

    def exists(self, name: str = "") -> bool:
        return self._ask(self.filesystem.exists, name)

    def is_file(self, name: str = "") -> bool:
        return self._ask(self.filesystem.isfile, name)

    def list(self, name: str = "") -> list[str]:
        """Names directly below `name`, sorted; empty where it does not exist."""
        if not self.exists(name):
            return []
        entries = self._ask(self.filesystem.ls, name, detail=False, refresh=True)
        names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry != self.path(name))
        return sorted(names)

    def size(self, name: str) -> int:
        return self._ask(self.filesystem.size, name)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The whole file, or the bytes start..stop (exclusive) of it."""
        return self._ask(self.filesystem.cat_file, name, start=start, end=stop)

    def write(self, name: str, data: bytes) -> None:
        if not self.is_local:
            self._ask(self.filesystem.pipe_file, name, data)
            return
        with self.open_write(name) as file:
            file.write(data)

    def create(self, name: str, data: bytes) -> None:
        """Write a small file that must not be there yet. Raises: FileExistsError, of two that try to one."""
        if self.is_local:
            with open(self.path(name), "xb") as file:
                file.write(data)
            return
        try:
            self._ask(self.filesystem.pipe_file, name, data, mode="create")
        except FileExistsError:
            # The answer to a first try may have been lost after it had done its work.
            if self.read(name) != data:
                raise

    def touch(self, name: str, data: bytes) -> None:
        """Show that the writer of a file lives: by its time on a disk, which a full one takes too, else by `data`."""
        if self.is_local:
            os.utime(self.path(name))
        else:
            self.write(name, data)

    def modified_ns(self, name: str) -> int | None:
        """Time of the last change of a file on a disk; None in an object store, or where the file is gone."""
        try:
            return os.stat(self.path(name)).st_mtime_ns if self.is_local else None
        except FileNotFoundError:
            return None

    @contextmanager
    def open_write(self, name: str) -> Iterator[IOBase]:
        """Write a large file piece by piece; it stays only if the `with` block ends without an error."""
        path = self.path(name)
        if not self.is_local:
            with _removed_on_error(self.filesystem.rm, path), self.filesystem.open(path, "wb") as file:
                yield file
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{os.getpid()}-{threading.get_ident()}.tmp"
        with _removed_on_error(os.unlink, temporary), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_directory(os.path.dirname(path))

    def make_directory(self, name: str = "") -> None:
        self._ask(self.filesystem.makedirs, name, exist_ok=True)

    def rename(self, source: str, target: str) -> None:
        """Move a file or directory; atomic on a local disk only."""
        if self.is_local:
            os.rename(self.path(source), self.path(target))
            _flush_directory(os.path.dirname(self.path(target)))
        else:
            self.filesystem.mv(self.path(source), self.path(target), recursive=True)

    def delete(self, name: str) -> None:
        """Remove a file or directory; nothing happens where it does not exist."""
        if not self.exists(name):
            return
        if self.is_local and os.path.isdir(self.path(name)):
            shutil.rmtree(self.path(name), ignore_errors=True)
            return
        # It may be gone already where the answer to a first try was lost.
        with suppress(FileNotFoundError):
            self._ask(self.filesystem.rm, name, recursive=True)

    def _ask(self, operation: Callable, name: str, *arguments: object, **options: object):
        """Call an operation of the file system on a path; a store that does not answer is asked again."""
        path = self.path(name)
        if self.is_local:
            return operation(path, *arguments, **options)
        return retried(lambda: operation(path, *arguments, **options), f"{operation.__name__} of {path}")


def _open_filesystem(root: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        # Listings must be fresh: other processes write there too.
        options = {"use_listings_cache": False} if "://" in root else {}
        return fsspec.core.url_to_fs(root, **options)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"files at {root} cannot be reached ({error}); correct the address, or install the package it needs "
            "(for s3:// that is s3fs, the extra `s3` of grail)"
        ) from error


def _protocols(filesystem: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


@contextmanager
def _removed_on_error(remove: Callable[[str], None], path: str) -> Iterator[None]:
    """Take away what a failed write left behind, so that a full disk gets its space back."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            remove(path)
        raise


def _flush_directory(path: str) -> None:
    """Make a rename durable: the directory entry itself must reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def renamed_at_end(path: str | Path) -> Iterator[Path]:
    """A temporary path beside the local file `path` that takes its name once it is complete, for what writes to a path
    and not to `Storage.open_write`."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        _flush_directory(str(path.parent))
    finally:
        temporary.unlink(missing_ok=True)
