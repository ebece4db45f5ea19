"""Downloading from a server on this machine that serves ranges, hangs up half way, or publishes a wrong checksum."""

import hashlib
import io
import random
import re
import tarfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.errors import DataError
from data_streams import fetch as fetch_module
from data_streams.fetch import fetch
from data_streams.origins import Origin, OriginFile, origins
from launch import cli

CONTENT = bytes(range(256)) * 12_000


@dataclass
class Site:
    """Files by path, and what went on."""

    files: dict[str, bytes]
    hang_up_after: int | None = None
    """Bytes after which the connection of the next request is cut."""
    ranges: bool = True
    version: dict[str, str] = field(default_factory=dict)
    """ETag or Last-Modified of all files."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def site(monkeypatch):
    site = Site(files={})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            site.asked.append((self.path, asked))
            content = site.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            unchanged = self.headers.get("If-Range", "") in ("", *site.version.values())
            start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and site.ranges and unchanged else 0
            if start and start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            for name, value in site.version.items():
                self.send_header(name, value)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            stop, site.hang_up_after = site.hang_up_after, None
            self.wfile.write(content[start : None if stop is None else start + stop])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    site.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(fetch_module, "PAUSE_S", 0.0)
    monkeypatch.setattr(fetch_module, "BLOCK_BYTES", 50_000)
    yield site
    server.shutdown()
    server.server_close()


def origin_of(site, name="set.zip", checksum=False):
    address = f"{site.address}/{name}"
    file = OriginFile(address=address, checksum_address=f"{address}.md5" if checksum else None)
    return Origin(name="set", home="http://owner.example", files=(file,))


def test_a_file_is_checked_against_the_checksum_of_its_owner(site, tmp_path):
    digest = hashlib.md5(CONTENT).hexdigest()
    for line in (f"{digest}  set.zip\n", f"MD5 (set.zip) = {digest}\n", f'{{"checksum": "md5:{digest}"}}'):
        site.files = {"/set.zip": CONTENT, "/set.zip.md5": line.encode()}
        folder = tmp_path / hashlib.sha256(line.encode()).hexdigest()
        (fetched,) = fetch(origin_of(site, checksum=True), folder)
        assert (folder / "set.zip").read_bytes() == CONTENT
        assert fetched.checked_against == f"md5 of {site.address}/set.zip.md5"
        assert fetched.sha256 == hashlib.sha256(CONTENT).hexdigest()


def test_a_broken_connection_is_taken_up_where_it_broke(site, tmp_path):
    site.files, site.hang_up_after = {"/set.zip": CONTENT}, 1_000_000
    fetch(origin_of(site), tmp_path)
    assert (tmp_path / "set.zip").read_bytes() == CONTENT
    (_, first), (_, second) = site.asked
    assert first is None and second.startswith("bytes=")
    assert 0 < int(second[6:-1]) <= 1_000_000
    assert not list(tmp_path.glob("*.part"))


def test_an_earlier_part_is_continued_or_begun_anew_where_the_server_knows_no_ranges(site, tmp_path):
    site.files = {"/set.zip": CONTENT}
    for ranges, name in ((True, "with"), (False, "without")):
        folder = tmp_path / name
        folder.mkdir()
        site.ranges = ranges
        (folder / "set.zip.part").write_bytes(CONTENT[:777])
        fetch(origin_of(site), folder)
        assert (folder / "set.zip").read_bytes() == CONTENT
        assert site.asked[-1] == ("/set.zip", "bytes=777-")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"ETag": '"a"'}, {"ETag": '"b"'}),
        (
            {"ETag": 'W/"a"', "Last-Modified": "Mon, 05 Jan 2026 10:00:00 GMT"},
            {"ETag": 'W/"a"', "Last-Modified": "Tue, 06 Jan 2026 10:00:00 GMT"},
        ),
    ],
)
@pytest.mark.parametrize("changes", [True, False])
def test_a_part_is_only_continued_while_its_owner_has_not_changed_the_file(
    site, tmp_path, monkeypatch, first, second, changes
):
    site.files, site.version, site.hang_up_after = {"/set.zip": CONTENT}, first, 1_000_000
    with monkeypatch.context() as once:
        once.setattr(fetch_module, "ATTEMPTS", 1)
        with pytest.raises(DataError, match="the same command goes on from there"):
            fetch(origin_of(site), tmp_path)
    expected = CONTENT
    if changes:
        expected = CONTENT[::-1]
        site.files, site.version = {"/set.zip": expected}, second
    (fetched,) = fetch(origin_of(site), tmp_path)
    assert (tmp_path / "set.zip").read_bytes() == expected
    assert fetched.sha256 == hashlib.sha256(expected).hexdigest()
    assert len(site.asked) == 2 and site.asked[1][1].startswith("bytes=")
    assert {path.name for path in tmp_path.iterdir()} == {"set.zip", "fetched.json"}


def test_a_file_that_changes_between_two_attempts_begins_anew(site, tmp_path, monkeypatch):
    def change(_):
        site.files, site.version = {"/set.zip": CONTENT[::-1]}, {"ETag": '"b"'}

    site.files, site.version, site.hang_up_after = {"/set.zip": CONTENT}, {"ETag": '"a"'}, 1_000_000
    monkeypatch.setattr(fetch_module.time, "sleep", change)
    fetch(origin_of(site), tmp_path)
    assert (tmp_path / "set.zip").read_bytes() == CONTENT[::-1]


def test_a_part_of_an_unknown_version_is_not_continued_where_the_server_names_one(site, tmp_path):
    site.files, site.version = {"/set.zip": CONTENT}, {"ETag": '"a"'}
    (tmp_path / "set.zip.part").write_bytes(b"other" * 100)
    fetch(origin_of(site), tmp_path)
    assert (tmp_path / "set.zip").read_bytes() == CONTENT
    assert [asked for _, asked in site.asked] == ["bytes=500-", None]


def test_a_part_that_is_all_is_only_checked_and_one_that_is_too_long_is_dropped(site, tmp_path):
    site.files = {"/set.zip": CONTENT}
    for name, part in (("all", CONTENT), ("long", CONTENT + b"more")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "set.zip.part").write_bytes(part)
        fetch(origin_of(site), tmp_path / name)
        assert (tmp_path / name / "set.zip").read_bytes() == CONTENT
    assert [asked for _, asked in site.asked] == [
        f"bytes={len(CONTENT)}-",
        f"bytes={len(CONTENT) + 4}-",
        None,
    ]


def test_a_wrong_checksum_is_refused_and_leaves_nothing_to_build_from(site, tmp_path):
    site.files = {"/set.zip": CONTENT, "/set.zip.md5": b"0" * 32}
    with pytest.raises(
        DataError, match=f"must have the md5 {'0' * 32} that .*, but what came has .* deleted"
    ):
        fetch(origin_of(site, checksum=True), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_published_checksum_the_own_one_is_written_down_and_said(site, tmp_path, caplog):
    site.files = {"/set.zip": CONTENT}
    with caplog.at_level("INFO"):
        (fetched,) = fetch(origin_of(site), tmp_path)
    assert fetched.checked_against is None
    assert "publishes no checksum" in caplog.text
    assert fetched.sha256 in (tmp_path / "fetched.json").read_text()


def test_what_is_there_is_not_downloaded_again(site, tmp_path):
    site.files = {"/set.zip": CONTENT}
    first = fetch(origin_of(site), tmp_path)
    assert fetch(origin_of(site), tmp_path) == first
    assert len(site.asked) == 1


def test_archives_are_unpacked_and_may_not_write_outside_their_folder(site, tmp_path):
    def archive(name, content=b"a,b"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        return buffer.getvalue()

    site.files = {"/good.tar.gz": archive("set/data/log.csv"), "/bad.tar.gz": archive("../log.csv")}
    fetch(origin_of(site, "good.tar.gz"), tmp_path / "good")
    assert (tmp_path / "good/set/data/log.csv").read_text() == "a,b"
    site.files["/damaged.tar.gz"] = (
        archive("log.csv", random.Random(0).randbytes(2**20))[: 2**19] + b"\xff" * 2**18
    )
    for name in ("bad", "damaged"):
        with pytest.raises(DataError, match=r"must be a whole \.tar\.gz"):
            fetch(origin_of(site, f"{name}.tar.gz"), tmp_path / "bad")
    assert not (tmp_path / "log.csv").exists()


def test_a_missing_file_and_a_missing_network_say_what_to_do_by_hand(site, tmp_path):
    with pytest.raises(DataError, match=r"does not give it .*404.*download it by hand from .* to .*set\.zip"):
        fetch(origin_of(site), tmp_path)
    nowhere = OriginFile(address="http://127.0.0.1:9/set.zip")
    with pytest.raises(DataError, match=r"no connection to 127\.0\.0\.1:9.*by hand from http://127"):
        fetch(Origin(name="set", home="http://owner.example", files=(nowhere,)), tmp_path)


def test_an_answer_that_is_no_checksum_is_refused(site, tmp_path):
    site.files = {"/set.zip": CONTENT, "/set.zip.md5": b"<html>moved</html>"}
    with pytest.raises(DataError, match="must name an MD5 or SHA-256, but says '<html>moved"):
        fetch(origin_of(site, checksum=True), tmp_path)


def test_every_origin_has_an_owner_and_either_files_or_instructions():
    known = origins()
    assert {"ml-1m", "amazon-2014-beauty", "kuairand-pure", "yoochoose", "ebnerd"} <= known.keys()
    for name, (_, origin) in known.items():
        assert origin.home.startswith("https://") and origin.name == name
        assert bool(origin.files) != bool(origin.by_hand), name
        assert all(file.name for file in origin.files)


def test_the_command_names_the_nearest_data_set_and_the_steps_by_hand(capsys):
    assert cli.run(["data", "fetch", "ml-1n"]) == 2
    assert "did you mean 'ml-1m'?" in capsys.readouterr().err
    assert cli.run(["data", "fetch", "ebnerd", "--out", "news"]) == 1
    said = capsys.readouterr().out
    assert "accept the terms" in said and "https://recsys.eb.dk" in said and "--path news" in said
    assert cli.run(["data", "fetch", "--help"]) == 0
    assert "amazon-2023-video-games" in capsys.readouterr().out
