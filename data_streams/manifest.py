"""The manifest of a data set: what its shards hold and where each chunk lies."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cluster.errors import ConfigError, DataError
from cluster.storage import Storage
from data_streams.schema import EXPOSURE

SCHEMA_VERSION = 1
KNOWN_SCHEMA_VERSIONS = (1,)
MANIFEST_NAME = "manifest.json"
REBUILD = "build the shards again with `grail data build`"


@dataclass(frozen=True, kw_only=True)
class ChunkRecord:
    """Where a chunk lies and what it weighs; the manifest holds one per chunk."""

    shard: str
    """Name of the tar below the data set's root."""
    start: int
    """First byte of the chunk in the tar."""
    stop: int
    """First byte after it."""
    sha256: str
    """Checksum of those bytes."""
    num_users: int
    num_events: int
    num_train_users: int
    """Users with at least two training events."""
    train_tokens: int
    """Training inputs before any cut: sum over users of max(train_end - 1, 0)."""
    train_tokens_by_cut: tuple[int, ...]
    """Training inputs after a cut to 1, 2, 4, 8, ... per user, up to where nobody is cut."""

    def tokens_cut_to(self, max_length: int) -> int:
        """Training inputs after a cut to `max_length`: exact at powers of two, interpolated between them."""
        power, last = max_length.bit_length() - 1, len(self.train_tokens_by_cut) - 1
        low, high = (self.train_tokens_by_cut[min(place, last)] for place in (power, power + 1))
        return low + (high - low) * (max_length - 2**power) // 2**power

    def __str__(self) -> str:
        return f"chunk at bytes {self.start}..{self.stop} of shard {self.shard}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a reader must know before it opens the first shard."""

    schema_version: int = SCHEMA_VERSION
    source: Mapping[str, Any]
    """What the data set was built from: name of the source and its options."""
    num_users: int
    num_items: int
    num_events: int
    split: Mapping[str, Any]
    """Name of the split into training, validation and test, and its parameters."""
    columns: Mapping[str, str]
    """Event column beside the item -> NumPy dtype."""
    actions: list[str] = field(default_factory=list)
    """Names of the codes in the column `action`."""
    train_length_counts: Mapping[int, int]
    """Training events of a user (train_end) -> number of such users."""
    num_train_history_events: int | None = None
    """Training events without those that lie beside the sequences; None where the build did not count them yet."""
    counters: Mapping[str, int] = field(default_factory=dict)
    """What the build left out, and why."""
    chunks: list[ChunkRecord]
    catalogue_sha256: str = ""
    """Checksum of items.parquet, so that a checkpoint knows its item vocabulary again."""
    embedding: Mapping[str, Any] | None = None
    """File, dimension and dtype of the item embeddings; None without any."""

    def fingerprint(self) -> str:
        """Changes with the content or the order of the chunks."""
        text = "".join(record.sha256 for record in self.chunks) + self.catalogue_sha256
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def beside_codes(self) -> list[int]:
        """Codes in the column `action` of what is no part of a user's sequence, such as exposures."""
        beside = {EXPOSURE, *self.split.get("page_actions", [])}
        return [code for code, name in enumerate(self.actions) if name in beside]

    def action_code(self, name: str) -> int:
        """How an action is written in the data. Raises: ConfigError where it is none of the data's."""
        if name not in self.actions:
            raise ConfigError(
                f"evaluation.held-out-action must be an action of the data, of {', '.join(self.actions) or 'none'}; "
                f"got {name}"
            )
        return self.actions.index(name)

    def save(self, storage: Storage) -> None:
        """Write the manifest: the last act of a build, because its presence says that all is there."""
        storage.write(MANIFEST_NAME, json.dumps(asdict(self), indent=1).encode())

    @staticmethod
    def load(storage: Storage) -> "Manifest":
        """Raises: DataError when the manifest is missing, damaged or of an unknown schema version."""
        content = _read_manifest_json(storage)
        version = content.get("schema_version")
        if version not in KNOWN_SCHEMA_VERSIONS:
            raise DataError(
                f"{storage.path(MANIFEST_NAME)} has schema version {version}, but this program reads "
                f"{', '.join(map(str, KNOWN_SCHEMA_VERSIONS))}; {REBUILD}"
            )
        # Data sets built before it was counted are read as ever.
        content.setdefault("num_train_history_events", None)
        _require_keys(content, Manifest, storage.path(MANIFEST_NAME))
        for record in content["chunks"]:
            _require_keys(record, ChunkRecord, f"a chunk of {storage.path(MANIFEST_NAME)}")
        content["chunks"] = [_chunk_record(record) for record in content["chunks"]]
        counts = content["train_length_counts"]
        content["train_length_counts"] = {int(length): int(users) for length, users in counts.items()}
        return Manifest(**content)


def _chunk_record(content: Mapping[str, Any]) -> ChunkRecord:
    return ChunkRecord(**{**content, "train_tokens_by_cut": tuple(content["train_tokens_by_cut"])})


def _read_manifest_json(storage: Storage) -> dict[str, Any]:
    path = storage.path(MANIFEST_NAME)
    try:
        content = json.loads(storage.read(MANIFEST_NAME))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{storage.root} holds no {MANIFEST_NAME}: it is not a data set, or its build did not finish; "
            "make one with `grail data build`"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); {REBUILD}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object; {REBUILD}")
    return content


def _require_keys(content: Mapping[str, Any], form: type, where: str) -> None:
    """The keys of a JSON object must be exactly the fields of the dataclass it becomes."""
    names = {entry.name for entry in fields(form)}
    missing, unknown = sorted(names - content.keys()), sorted(content.keys() - names)
    if missing or unknown:
        raise DataError(
            f"{where} does not have the expected keys (missing: {', '.join(missing) or 'none'}; unknown: "
            f"{', '.join(unknown) or 'none'}); {REBUILD}"
        )
