"""Writing small files as owners of data sets publish them, and reading all of a source."""

import gzip

import polars as pl


def read(source):
    return pl.concat([batch for part in source.parts() for batch in source.read(part)])


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode("latin-1"))
    return str(folder)


def gzipped(lines):
    return gzip.compress("".join(f"{line}\n" for line in lines).encode())
