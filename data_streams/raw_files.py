"""Files of a data set as its owner publishes them: in a folder or a .zip, plain or compressed by gzip."""

import gzip
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import IO

import fsspec
import polars as pl

from cluster.errors import DataError
from cluster.storage import Storage
from data_streams.origins import RECORD_NAME
from data_streams.sources import Part

BLOCK_BYTES = 8 * 2**20
"""Lines are read and parsed in blocks of about this size."""
PART_BYTES = 128 * 2**20
"""Plain text files are read side by side in portions of this size; compressed ones by one task each."""
BATCH_ROWS = 500_000
UNREADABLE = (OSError, EOFError, zlib.error, zipfile.BadZipFile)
"""What a file that is missing, cut or damaged raises."""
GZIP_RATIO = 3
"""About how much smaller a compressed file is."""


class RawFiles:
    """Finds and reads files below a folder, in a .zip (or a folder with nothing else), or a single one.

    They may lie on this machine or at any fsspec address.
    """

    def __init__(self, path: str):
        """Raises: DataError when nothing is there, ConfigError for an address that nothing here reads."""
        storage = Storage(path.rstrip("/"))
        filesystem, root = storage.filesystem, storage.root
        # Tasks on other processes may run in another folder.
        self.path = path.rstrip("/") if "://" in path else root
        if not filesystem.exists(root):
            raise DataError(
                f"the data set's folder, .zip or file must exist, but nothing is at {path}; check --path"
            )
        if filesystem.isdir(root):
            start = len(root.rstrip("/")) + 1
            self.files = sorted(name[start:] for name in filesystem.find(root))
            self.files = [name for name in self.files if self._base(name) != RECORD_NAME]
            if len(self.files) == 1 and self.files[0].endswith(".zip"):
                self.path = f"{self.path}/{self.files[0]}"
        else:
            self.files = [""]
        self.is_zip = self.path.endswith(".zip")
        if self.is_zip:
            self.files = sorted(entry.filename for entry in self._zip().infolist() if not entry.is_dir())

    def find(self, *patterns: str) -> list[str]:
        """Files whose own name fits one of the patterns, wherever below the folder they lie; sorted."""
        return [
            name for name in self.files if any(fnmatch(self._base(name), pattern) for pattern in patterns)
        ]

    def require(self, *patterns: str) -> list[str]:
        """Raises: DataError when no file fits."""
        found = self.find(*patterns)
        if not found:
            there = ", ".join(self._base(name) for name in self.files[:8]) or "no files"
            raise DataError(
                f"{self.path} must hold {' or '.join(patterns)}, but holds {there}; give the folder of the "
                "official files with --path"
            )
        return found

    def only(self, *patterns: str) -> str | None:
        """The one file that fits, or None.

        Raises: DataError when several fit, since each would be read as the whole.
        """
        found = self.find(*patterns)
        if len(found) > 1:
            raise DataError(
                f"{self.path} must hold one {' or '.join(patterns)}, but holds {', '.join(found)}; "
                "give the folder of one release with --path"
            )
        return found[0] if found else None

    def open(self, name: str) -> IO[bytes]:
        """The content of a file, without its compression."""
        file = self._zip().open(name) if self.is_zip else fsspec.open(self._address(name), "rb").open()
        return gzip.open(file) if self._base(name).endswith(".gz") else file

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def first_line(self, name: str) -> bytes:
        """With its line break."""
        try:
            with self.open(name) as file:
                return file.readline()
        except UNREADABLE as error:
            raise DataError(f"{self.path}/{name} cannot be read: {error}; fetch it again") from error

    def num_bytes(self, name: str) -> int:
        """About how much text a file holds."""
        if self.is_zip:
            size = self._zip().getinfo(name).file_size
        else:
            size = Storage(self._address(name)).size("")
        return size * GZIP_RATIO if self._base(name).endswith(".gz") else size

    def parts(self, name: str, start: int = 0) -> list[Part]:
        """Portions of a text file by bytes; a line belongs to the part in which it begins.

        `start` is the first byte after a header.
        """
        if self.is_zip or self._base(name).endswith(".gz"):
            return [Part(name=name, start=start)]
        size = self.num_bytes(name)
        starts = range(start, size, PART_BYTES)
        return [Part(name=name, start=first, stop=min(first + PART_BYTES, size)) for first in starts]

    def blocks(self, part: Part) -> Iterator[bytes]:
        """The whole lines of a part, block by block."""
        try:
            with self.open(part.name) as file:
                yield from _line_blocks(file, part.start, part.stop)
        except UNREADABLE as error:
            raise DataError(f"{self.path}/{part.name} cannot be read: {error}; fetch it again") from error

    def _zip(self) -> zipfile.ZipFile:
        """Opened for every use, so that the sources that hold this object can be sent to other processes."""
        try:
            return zipfile.ZipFile(fsspec.open(self.path, "rb").open())
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{self.path} cannot be read: {error}; fetch it again") from error

    def _address(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def _base(self, name: str) -> str:
        return (name or self.path).rsplit("/", 1)[-1]


def _line_blocks(file: IO[bytes], start: int, stop: int | None) -> Iterator[bytes]:
    position = start
    if start:
        # The line that is under way one byte earlier belongs to what comes before.
        file.seek(start - 1)
        position = start - 1 + len(file.readline())
    while stop is None or position < stop:
        block = file.read(BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - position))
        if not block:
            return
        if not block.endswith(b"\n"):
            block += file.readline()
        position += len(block)
        yield block


def parse_csv(
    block: bytes, columns: Mapping[str, pl.DataType], *, separator: str = ",", where: str
) -> pl.DataFrame:
    """Lines without a header; fields that are not of their column's type become null.

    Raises: DataError when the lines do not have these columns.
    """
    try:
        return pl.read_csv(
            block,
            has_header=False,
            separator=separator,
            schema=dict(columns),
            ignore_errors=True,
            quote_char='"' if separator == "," else None,
        )
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"the lines of {where} must have the columns {', '.join(columns)} ({error}); fetch it again"
        ) from error


def read_table(files: RawFiles, name: str, types: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """A comma-separated table with a header, read whole; columns that are not named in `types` are text."""
    try:
        return pl.read_csv(files.read(name), infer_schema=False).with_columns(
            pl.col(column).cast(dtype, strict=False) for column, dtype in types.items()
        )
    except (pl.exceptions.PolarsError, *UNREADABLE) as error:
        raise DataError(f"{files.path}/{name} cannot be read: {error}; fetch it again") from error


def require_columns(given: list[str], needed: list[str], where: str) -> None:
    missing = [name for name in needed if name not in given]
    if missing:
        raise DataError(
            f"{where} must have the columns {', '.join(needed)}; it lacks {', '.join(missing)} and has "
            f"{', '.join(given)}; give the official file"
        )


def in_batches(frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The same rows in frames of at least `BATCH_ROWS`, the last one excepted."""
    waiting, rows = [], 0
    for frame in frames:
        waiting.append(frame)
        rows += frame.height
        if rows >= BATCH_ROWS:
            yield pl.concat(waiting)
            waiting, rows = [], 0
    if waiting:
        yield pl.concat(waiting)
