"""Semantic IDs: every item is a path of L codes, kept as a table that knows the catalogue it belongs to.

Files of a table: `semantic_ids.parquet` (item_id, code_0, code_1, ...) and `semantic_ids.json`, the header with its
format version, the checksum of the Parquet file, the catalogue's fingerprint and how the codes were made.

Shapes: N items, L levels; row i of everything belongs to item row i of the data set.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from cluster.errors import CheckpointError, DataError
from cluster.storage import Storage
from data_streams.item_table import catalogue_fingerprint

FORMAT_VERSION = 1
TABLE_NAME = "semantic_ids.parquet"
HEADER_NAME = "semantic_ids.json"
AGAIN = "make the table again with `grail tokenize`"

_NAMED = 3
_HEADER_KEYS = {
    "format_version",
    "num_items",
    "code_sizes",
    "catalogue",
    "fingerprint",
    "extends",
    "tokenizer",
    "sha256",
}


@dataclass(frozen=True, kw_only=True)
class SemanticIdTable:
    """Raises: DataError naming the items when codes are missing, out of range or of another number of items."""

    item_ids: pl.Series
    """[N] raw ids of the catalogue, in the order of the item rows."""
    codes: np.ndarray
    """[N, L] int32, 0 <= codes[:, l] < code_sizes[l]; several items may share a path."""
    code_sizes: tuple[int, ...]
    """How many codes each level has."""
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """What made the codes: name, options and what they were made from, as plain JSON values."""
    extends: tuple[str, ...] = ()
    """Fingerprints of the tables whose items keep their codes in this one, oldest first."""

    def __post_init__(self):
        _check_unique(self.item_ids, "the catalogue")
        _check_codes(self.item_ids, self.codes, self.code_sizes)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_levels(self) -> int:
        return len(self.code_sizes)

    @cached_property
    def catalogue(self) -> str:
        return catalogue_fingerprint(self.item_ids)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any code, code size or item; what a model keeps in order to refuse another table."""
        head = json.dumps([FORMAT_VERSION, list(self.code_sizes), self.catalogue])
        codes = np.ascontiguousarray(self.codes, dtype="<i4").tobytes()
        return hashlib.sha256(head.encode() + codes).hexdigest()[:16]

    def extends_or_is(self, fingerprint: str) -> bool:
        """Whether the items of the table of this fingerprint have the same codes here."""
        return fingerprint in (self.fingerprint, *self.extends)

    def require(self, fingerprint: str) -> None:
        """Check that a model trained with the table of this fingerprint may use this one: it, or an extension.

        Raises: CheckpointError where the IDs have changed.
        """
        if not self.extends_or_is(fingerprint):
            raise CheckpointError(
                f"the model was trained with the semantic IDs {fingerprint}, and this table is "
                f"{self.fingerprint}, in which items have other codes; give the table of the model"
            )

    def extended(self, item_ids: pl.Series, new_codes: np.ndarray) -> "SemanticIdTable":
        """The table of a larger catalogue, in which the items of this one keep their codes.

        `new_codes` belong to the items of `item_ids` that this table lacks, in their order.

        Shapes: item_ids [N'], new_codes [N' - N, L].
        Raises: DataError where an item of this table is not in the larger catalogue.
        """
        _check_unique(item_ids, "the larger catalogue")
        is_old = self.holds(item_ids)
        if int(is_old.sum()) != self.num_items:
            lost = self.item_ids.filter(~self.item_ids.is_in(item_ids.implode()))
            raise DataError(
                f"the larger catalogue must have every item of the table; {named(lost)} are not in it; keep "
                "them in the data set, or make a new table"
            )
        codes = np.empty((len(item_ids), self.num_levels), dtype=np.int32)
        codes[is_old] = self.codes[_rows_of(item_ids.filter(pl.Series(is_old)), self.item_ids)]
        codes[~is_old] = new_codes
        return SemanticIdTable(
            item_ids=item_ids,
            codes=codes,
            code_sizes=self.code_sizes,
            tokenizer=self.tokenizer,
            extends=(*self.extends, self.fingerprint),
        )

    def holds(self, item_ids: pl.Series) -> np.ndarray:
        """Which of these items have codes here. Shapes: [n] bool."""
        return _same_type(item_ids, self.item_ids.dtype).is_in(self.item_ids.implode()).to_numpy()

    def save(self, path: str | Storage) -> None:
        """Write Parquet and header below a folder; the header comes last and makes the table complete."""
        storage = path if isinstance(path, Storage) else Storage(path)
        columns = {_code_column(level): self.codes[:, level] for level in range(self.num_levels)}
        content = io.BytesIO()
        pl.DataFrame({"item_id": self.item_ids, **columns}).write_parquet(content)
        header = {
            "format_version": FORMAT_VERSION,
            "num_items": self.num_items,
            "code_sizes": list(self.code_sizes),
            "catalogue": self.catalogue,
            "fingerprint": self.fingerprint,
            "extends": list(self.extends),
            "tokenizer": self.tokenizer,
            "sha256": hashlib.sha256(content.getvalue()).hexdigest(),
        }
        storage.write(TABLE_NAME, content.getvalue())
        storage.write(HEADER_NAME, json.dumps(header, indent=1).encode())

    @staticmethod
    def load(path: str | Storage, item_ids: pl.Series | None = None) -> "SemanticIdTable":
        """Read a table; where `item_ids` are given, it must be the table of exactly this catalogue.

        Raises: DataError for a missing, damaged or unreadable table and for one of another catalogue.
        """
        storage = path if isinstance(path, Storage) else Storage(path)
        header = _read_header(storage)
        frame = _read_frame(storage, header)
        columns = [_code_column(level) for level in range(len(header["code_sizes"]))]
        _require_columns(frame, ["item_id", *columns], storage.path(TABLE_NAME))
        if item_ids is not None:
            _require_catalogue(frame["item_id"], item_ids, storage.path(TABLE_NAME))
        table = SemanticIdTable(
            item_ids=frame["item_id"] if item_ids is None else item_ids,
            # Copied: of one column polars gives a view that nobody may write to, which torch warns of.
            codes=np.array(frame.select(columns).to_numpy(), dtype=np.int32, order="C"),
            code_sizes=tuple(header["code_sizes"]),
            tokenizer=header["tokenizer"],
            extends=tuple(header["extends"]),
        )
        if table.fingerprint != header["fingerprint"]:
            raise DataError(
                f"{storage.path(TABLE_NAME)} has the fingerprint {table.fingerprint}, its header says "
                f"{header['fingerprint']}; copy the folder again or {AGAIN}"
            )
        return table

    @staticmethod
    def from_frame(
        frame: pl.DataFrame,
        item_ids: pl.Series,
        *,
        code_sizes: Sequence[int],
        tokenizer: Mapping[str, Any],
        name: str,
    ) -> "SemanticIdTable":
        """Bring codes that lie in any order into that of the catalogue; columns item_id and codes (lists).

        Raises: DataError naming items that are missing, unknown or there twice, and codes that do not fit.
        """
        _require_columns(frame, ["item_id", "codes"], name)
        given = _same_type(frame["item_id"], item_ids.dtype)
        _check_unique(given, name)
        _require_items(given, item_ids, name)
        ragged = (frame["codes"].list.len() != len(code_sizes)).fill_null(True)
        if ragged.any():
            raise DataError(
                f"{name} must give every item {len(code_sizes)} codes; {named(given.filter(ragged))} have "
                "another number; mend the file"
            )
        codes = frame["codes"].list.to_array(len(code_sizes)).to_numpy()
        return SemanticIdTable(
            item_ids=item_ids,
            codes=np.ascontiguousarray(codes[_rows_of(item_ids, given)], dtype=np.int32),
            code_sizes=tuple(code_sizes),
            tokenizer=tokenizer,
        )


def named(item_ids: pl.Series) -> str:
    """A few items in words, such as: 5 items (A1, B7, C3, ...)."""
    shown = ", ".join(str(item) for item in item_ids[:_NAMED])
    return f"{len(item_ids)} items ({shown}{', ...' if len(item_ids) > _NAMED else ''})"


def _code_column(level: int) -> str:
    return f"code_{level}"


def _same_type(item_ids: pl.Series, dtype: pl.DataType) -> pl.Series:
    return item_ids if item_ids.dtype == dtype else item_ids.cast(dtype, strict=False)


def _rows_of(wanted: pl.Series, known: pl.Series) -> np.ndarray:
    """The row in `known` of each wanted id; all of them are there."""
    rows = pl.DataFrame({"item_id": known}).with_row_index("row")
    wanted_frame = pl.DataFrame({"item_id": _same_type(wanted, known.dtype)})
    return wanted_frame.join(rows, on="item_id", how="left", maintain_order="left")["row"].to_numpy()


def _check_unique(item_ids: pl.Series, name: str) -> None:
    if item_ids.null_count():
        raise DataError(f"{name} has {item_ids.null_count()} rows without an item id; remove or name them")
    repeated = item_ids.filter(item_ids.is_duplicated()).unique().sort()
    if len(repeated):
        raise DataError(
            f"{name} must have one row per item; {named(repeated)} occur more than once; remove the "
            "repeated rows"
        )


def _check_codes(item_ids: pl.Series, codes: np.ndarray, code_sizes: tuple[int, ...]) -> None:
    if not code_sizes or min(code_sizes) < 1:
        raise DataError(f"a table needs at least one level with at least one code each, got {code_sizes}")
    if codes.shape != (len(item_ids), len(code_sizes)) or codes.dtype != np.int32:
        raise DataError(
            f"{len(item_ids)} items with {len(code_sizes)} levels need int32 codes {len(item_ids)} x "
            f"{len(code_sizes)}, got {codes.dtype} {codes.shape}; give every item its codes"
        )
    outside = (codes < 0) | (codes >= np.asarray(code_sizes))
    rows = np.flatnonzero(outside.any(axis=1))
    if len(rows):
        level = int(outside[rows[0]].argmax())
        raise DataError(
            f"codes of level {level} must be 0..{code_sizes[level] - 1}, but {codes[rows[0], level]} is that of "
            f"item {item_ids[int(rows[0])]}; {named(item_ids[rows.tolist()])} have codes out of range; {AGAIN}"
        )


def _read_header(storage: Storage) -> dict[str, Any]:
    path = storage.path(HEADER_NAME)
    try:
        header = json.loads(storage.read(HEADER_NAME))
    except FileNotFoundError as error:
        raise DataError(
            f"{storage.root} must hold semantic IDs, and there is no {HEADER_NAME}; look at the path, or {AGAIN}"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); copy it again or {AGAIN}") from error
    if not isinstance(header, dict) or header.get("format_version") != FORMAT_VERSION:
        version = header.get("format_version") if isinstance(header, dict) else None
        raise DataError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}; {AGAIN}")
    if header.keys() != _HEADER_KEYS:
        raise DataError(
            f"{path} must have the keys {', '.join(sorted(_HEADER_KEYS))}, and has "
            f"{', '.join(sorted(header))}; {AGAIN}"
        )
    return header


def _read_frame(storage: Storage, header: Mapping[str, Any]) -> pl.DataFrame:
    path = storage.path(TABLE_NAME)
    try:
        data = storage.read(TABLE_NAME)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; copy it again or {AGAIN}") from error
    if hashlib.sha256(data).hexdigest() != header["sha256"]:
        raise DataError(
            f"{path} does not match the checksum of its header: it is damaged or of another table; copy it "
            f"again or {AGAIN}"
        )
    return pl.read_parquet(io.BytesIO(data))


def _require_columns(frame: pl.DataFrame, names: Sequence[str], where: str) -> None:
    missing = [name for name in names if name not in frame.columns]
    if missing:
        raise DataError(
            f"{where} must have the columns {', '.join(names)}, and lacks {', '.join(missing)} (it has "
            f"{', '.join(frame.columns)})"
        )


def _require_items(given: pl.Series, item_ids: pl.Series, name: str) -> None:
    missing = item_ids.filter(~item_ids.is_in(given.implode()))
    unknown = given.filter(~given.is_in(item_ids.implode()))
    if len(missing) or len(unknown):
        facts = [f"lacks {named(missing)}"] * bool(len(missing))
        facts += [f"has {named(unknown)} that the data set does not have"] * bool(len(unknown))
        raise DataError(
            f"{name} must have the {len(item_ids)} items of the data set, but {' and '.join(facts)}; give the "
            "table of this catalogue, or add the new items with `grail tokenize add`"
        )


def _require_catalogue(given: pl.Series, item_ids: pl.Series, name: str) -> None:
    """The same items in the same order."""
    if catalogue_fingerprint(given) == catalogue_fingerprint(item_ids):
        return
    _require_items(_same_type(given, item_ids.dtype), item_ids, name)
    row = int((_same_type(given, item_ids.dtype) != item_ids).arg_max() or 0)
    raise DataError(
        f"{name} belongs to another catalogue: its items are in another order, the first at row {row} "
        f"({given[row]}, in the data set {item_ids[row]}); {AGAIN}"
    )
