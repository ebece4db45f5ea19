"""Downloads the files of a data set from its owner: resumed where it broke off, and checked."""

import gzip
import hashlib
import json
import logging
import os
import re
import tarfile
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import requests
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from cluster.errors import DataError
from data_streams.origins import RECORD_NAME, Origin, OriginFile

logger = logging.getLogger(__name__)

BLOCK_BYTES = 2**20
TIMEOUT_S = 60.0
ATTEMPTS = 5
PAUSE_S = 2.0
"""Between one attempt and the next; a bit longer each time."""
DIGESTS = {32: "md5", 64: "sha256"}
"""Hexadecimal digits of a checksum -> its kind."""


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What is written down of a file beside it, in fetched.json."""

    name: str
    address: str
    num_bytes: int
    sha256: str
    checked_against: str | None
    """Kind and address of the owner's checksum; None where the owner publishes none."""


def fetch(origin: Origin, folder: Path) -> list[Fetched]:
    """Download what is not yet in the folder, check it, and unpack .tar.gz files.

    Raises: DataError without a network, for a file that the owner does not give, and for a wrong checksum.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = _read_record(folder)
    with _progress() as progress, requests.Session() as session:
        for file in origin.files:
            target = folder / file.name
            if file.name not in known or not target.exists():
                known[file.name] = _fetch_file(session, progress, origin, file, target)
                _write_record(folder, known)
    return [known[file.name] for file in origin.files]


def _fetch_file(
    session: requests.Session, progress: Progress, origin: Origin, file: OriginFile, target: Path
) -> Fetched:
    bar = progress.add_task(file.name, total=None)
    partial = target.with_name(f"{target.name}.part")
    try:
        expected = _published_digest(session, file)
        _download(session, file.address, partial, progress, bar)
    except requests.RequestException as error:
        raise DataError(_cannot(origin, file, target, partial, error)) from error
    digests = _digests(partial)
    if expected is not None and digests[DIGESTS[len(expected)]] != expected:
        _drop(partial)
        raise DataError(
            f"{file.address} must have the {DIGESTS[len(expected)]} {expected} that {file.checksum_address} "
            f"publishes, but what came has {digests[DIGESTS[len(expected)]]} and was deleted; fetch it again"
        )
    _unpack(partial, file.name)
    os.replace(partial, target)
    _drop(partial)
    checked = None if expected is None else f"{DIGESTS[len(expected)]} of {file.checksum_address}"
    _say(file.name, digests["sha256"], checked)
    return Fetched(
        name=file.name,
        address=file.address,
        num_bytes=target.stat().st_size,
        sha256=digests["sha256"],
        checked_against=checked,
    )


def _cannot(
    origin: Origin, file: OriginFile, target: Path, partial: Path, error: requests.RequestException
) -> str:
    host = file.address.split("/")[2]
    if isinstance(error, requests.HTTPError):
        what = f"{host} does not give it ({error})"
    else:
        what = f"this machine has no connection to {host}, or lost it ({error})"
    came = (
        f"what came so far is in {partial} and the same command goes on from there; "
        if partial.exists()
        else ""
    )
    unpack = " and unpack it there" if target.name.endswith(".tar.gz") else ""
    return (
        f"{file.name} must be downloaded, but {what}; {came}on a machine with a network download it by hand from "
        f"{file.address} to {target}{unpack} (its page: {origin.home})"
    )


def _say(name: str, sha256: str, checked: str | None) -> None:
    if checked is None:
        logger.info(
            "%s: its owner publishes no checksum; sha256 of what came: %s (in %s)", name, sha256, RECORD_NAME
        )
    else:
        logger.info("%s has the %s", name, checked)


def _download(
    session: requests.Session, address: str, partial: Path, progress: Progress, bar: TaskID
) -> None:
    """Go on behind what is there already, and after a connection that broke."""
    for attempt in range(ATTEMPTS):
        before = partial.stat().st_size if partial.exists() else 0
        try:
            if _download_once(session, address, partial, progress, bar):
                return
            broken = requests.ConnectionError("the connection ended before the file did")
        except (
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
        ) as error:
            broken = error
        came = partial.stat().st_size if partial.exists() else 0
        if attempt == ATTEMPTS - 1 or (came == 0 and before == 0):
            raise broken
        logger.info("the connection broke after %d bytes (%s); going on from there", came, broken)
        time.sleep(PAUSE_S * (attempt + 1))


def _download_once(
    session: requests.Session, address: str, partial: Path, progress: Progress, bar: TaskID
) -> bool:
    """Append to the partial file -> whether it is complete. It begins anew where the owner has changed the file."""
    have = partial.stat().st_size if partial.exists() else 0
    # Compression on the way would make ranges and lengths those of other bytes.
    headers = {"Accept-Encoding": "identity", **(_rest(partial, have) if have else {})}
    with session.get(address, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        if answer.status_code == requests.codes.requested_range_not_satisfiable:
            return _is_complete(answer, have, partial)
        answer.raise_for_status()
        resumed = answer.status_code == requests.codes.partial_content and _first_byte(answer) == have
        if resumed and _version(answer) not in (None, _kept_version(partial)):
            # Some servers do not know If-Range, and of a part from elsewhere nobody knows the version.
            _drop(partial)
            return False
        if not resumed:
            have = 0
            _begin(partial, answer)
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        progress.update(bar, total=total, completed=have)
        with partial.open("ab") as file:
            for block in answer.iter_content(BLOCK_BYTES):
                file.write(block)
                progress.update(bar, advance=len(block))
    return total is None or partial.stat().st_size == total


def _is_complete(answer: requests.Response, have: int, partial: Path) -> bool:
    """The server has nothing behind what is there: it is all, or it is of another file and begins anew."""
    total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    if total.isdigit() and int(total) == have:
        return True
    _drop(partial)
    return False


def _rest(partial: Path, have: int) -> dict[str, str]:
    """The headers that ask for what is behind the part, as long as the file is the one that the part is of."""
    version = _kept_version(partial)
    return {"Range": f"bytes={have}-", **({"If-Range": version} if version else {})}


def _begin(partial: Path, answer: requests.Response) -> None:
    """Nothing of a part is left, and which version of the file the next one is of stands beside it."""
    # In this order: a part may never lie beside the version of another one.
    _drop(partial)
    version = _version(answer)
    if version:
        _version_file(partial).write_text(version)


def _version(answer: requests.Response) -> str | None:
    """What tells two files of one address apart, where the server says it."""
    etag = answer.headers.get("ETag", "")
    # Two files of one weak tag (W/"...") may differ in bytes, so it does not go into If-Range.
    return etag if etag.startswith('"') else answer.headers.get("Last-Modified")


def _kept_version(partial: Path) -> str | None:
    path = _version_file(partial)
    return path.read_text() if path.exists() else None


def _drop(partial: Path) -> None:
    for path in (partial, _version_file(partial)):
        path.unlink(missing_ok=True)


def _version_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.version")


def _first_byte(answer: requests.Response) -> int | None:
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _published_digest(session: requests.Session, file: OriginFile) -> str | None:
    """The checksum in what the owner publishes: a line of md5sum, of md5, or a JSON record."""
    if file.checksum_address is None:
        return None
    answer = session.get(file.checksum_address, timeout=TIMEOUT_S)
    answer.raise_for_status()
    marked = re.search(r"(?:md5|sha256):([0-9a-f]+)", answer.text.lower())
    plain = re.search(r"\b([0-9a-f]{64}|[0-9a-f]{32})\b", answer.text.lower())
    found = marked or plain
    if found is None or len(found[1]) not in DIGESTS:
        raise DataError(
            f"{file.checksum_address} must name an MD5 or SHA-256, but says {answer.text[:80]!r}; look at the "
            "owner's page and download by hand"
        )
    return found[1]


def _digests(path: Path) -> dict[str, str]:
    kinds = {name: hashlib.new(name) for name in DIGESTS.values()}
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            for kind in kinds.values():
                kind.update(block)
    return {name: kind.hexdigest() for name, kind in kinds.items()}


def _unpack(path: Path, name: str) -> None:
    """A .tar.gz cannot be read in parts, unlike a .zip. Only plain files below the folder are accepted."""
    if not name.endswith(".tar.gz"):
        return
    logger.info("unpacking %s", name)
    try:
        with tarfile.open(path) as archive:
            archive.extractall(path.parent, filter="data")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} must be a whole .tar.gz, but: {error}; delete it and fetch it again"
        ) from error


def _read_record(folder: Path) -> dict[str, Fetched]:
    path = folder / RECORD_NAME
    if not path.exists():
        return {}
    try:
        return {entry["name"]: Fetched(**entry) for entry in json.loads(path.read_text())}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} must be what an earlier fetch wrote, but: {error}; delete it") from error


def _write_record(folder: Path, known: dict[str, Fetched]) -> None:
    (folder / RECORD_NAME).write_text(
        json.dumps([asdict(entry) for entry in known.values()], indent=1) + "\n"
    )


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
