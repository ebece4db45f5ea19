"""Text files cut into parts and blocks."""

from itertools import pairwise

import pytest

from cluster.errors import ConfigError
from data_streams import raw_files
from data_streams.raw_files import RawFiles
from data_streams.sources.events import EventsSource


def test_every_line_is_read_once_however_a_file_is_cut(tmp_path, monkeypatch):
    lines = [f"{number},{'x' * (number % 7)}" for number in range(200)]
    for end in ("\n", ""):
        path = tmp_path / f"log{len(end)}.csv"
        path.write_text("a,b\n" + "\n".join(lines) + end)
        files = RawFiles(str(path))
        for part_bytes, block_bytes in ((10**9, 10**9), (50, 7), (13, 5), (1, 3)):
            monkeypatch.setattr(raw_files, "PART_BYTES", part_bytes)
            monkeypatch.setattr(raw_files, "BLOCK_BYTES", block_bytes)
            parts = files.parts("", start=len(files.first_line("")))
            assert all(first.stop == second.start for first, second in pairwise(parts))
            read_back = b"".join(block for part in parts for block in files.blocks(part))
            assert read_back.decode().splitlines() == lines


def test_a_relative_path_is_found_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "log.csv").write_text("a,b\n")
    monkeypatch.chdir(tmp_path)
    files = RawFiles("raw")
    monkeypatch.chdir("/")
    assert files.read("log.csv") == b"a,b\n"


def test_addresses_that_nothing_here_reads_are_refused():
    for address in ("nobodys://bucket/log.csv", "s4://bucket/log.csv"):
        for open_source in (RawFiles, lambda path: EventsSource.Config(events=(path,)).build()):
            with pytest.raises(ConfigError, match=f"files at {address} cannot be reached"):
                open_source(address)
