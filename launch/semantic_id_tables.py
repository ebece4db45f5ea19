"""Making, extending and importing semantic ID tables: what the `grail tokenize` commands have in common.

semantic_ids.parquet, .json   the table and its header
tokenizer.json, .safetensors  what encodes new items later
fusion.safetensors            how several inputs become one vector
report.json, report.png       what `grail tokenize report` shows
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import ConfigError, DataError
from cluster.storage import Storage
from launch.item_embeddings import EmbeddingOptions, EmbeddingSources, load_inputs, load_matrices

if TYPE_CHECKING:
    from data_streams.item_table import ItemTable
    from data_streams.semantic_id_report import SemanticIdReport
    from data_streams.semantic_ids import SemanticIdTable

FUSION_NAME = "fusion.safetensors"
EXTRA_CODE = "extra-code"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """What every `grail tokenize` command is told that writes a table."""

    data: str
    """Folder or address of the shards whose items get IDs."""
    out: str
    """Folder the table is written to."""
    overwrite: bool = False
    """Replace a table that is at --out."""
    category_level: int | None = None
    """Place in the items' category lists that prefixes are compared with, from 0 on; left out, the first one at
    which no category covers 90 % of the items that have one there."""

    def __post_init__(self) -> None:
        if self.category_level is not None and self.category_level < 0:
            raise ConfigError(f"--category-level counts from 0 on, got {self.category_level}")


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions(TableOptions):
    """What `grail tokenize` is told beside the options of the tokenizer."""

    collisions: Literal["extra-code", "reassign", "keep"] = EXTRA_CODE
    """Items of one path: number them in one more level, move them to the nearest free path, or leave them."""
    extra_codes: int | None = None
    """Size of that level, with room for items that are added later; left out, that of the largest group."""
    embeddings: EmbeddingOptions = field(default_factory=EmbeddingOptions)


def make_table(tokenizer_config: Any, options: TokenizeOptions) -> "SemanticIdReport":
    """Fit a tokenizer to the items of a data set and write table, tokenizer and report.

    Raises: ConfigError for options that do not fit; DataError for unusable vectors.
    """
    from data_streams.item_table import ItemTable
    from data_streams.semantic_ids import SemanticIdTable
    from models.tokenizers.collisions import tell_apart
    from models.tokenizers.tokenizer import describe

    if options.extra_codes is not None and (options.collisions != EXTRA_CODE or options.extra_codes < 1):
        raise ConfigError("--extra-codes belongs to --collisions extra-code and must be at least 1")
    open_out(options)
    items = ItemTable.load(options.data)
    inputs = load_inputs(options.embeddings, items, data=options.data, out=options.out)
    tokenizer = tokenizer_config.build(dim=inputs.vectors.shape[1])
    tokenizer.fit(inputs.vectors)
    codes, code_sizes = tell_apart(
        tokenizer,
        inputs.vectors,
        tokenizer.assign(inputs.vectors),
        method=options.collisions,
        extra_codes=options.extra_codes,
    )
    table = SemanticIdTable(
        item_ids=items.item_ids,
        codes=codes,
        code_sizes=code_sizes,
        tokenizer={**describe(tokenizer), "inputs": inputs.kinds, "collisions": options.collisions},
    )
    report = measured(table, tokenizer, inputs.vectors, items, options)
    return write_table(table, tokenizer, inputs.fusion, report, options)


def extend_table(old: str, options: TableOptions, embeddings: EmbeddingSources) -> "SemanticIdReport":
    """Give codes to the items of a data set that an older table lacks; all others keep theirs.

    Raises: DataError where the older table has no tokenizer, other inputs, or items the data set does not have.
    """
    import numpy as np

    from data_streams.item_table import ItemTable
    from data_streams.item_vectors import FusedVectors
    from data_streams.semantic_ids import SemanticIdTable
    from models.tokenizers.collisions import codes_of_new_items
    from models.tokenizers.tokenizer import load_tokenizer

    before = Storage(old)
    table, tokenizer, fusion = SemanticIdTable.load(before), load_tokenizer(before), _load_fusion(before)
    open_out(options)
    if embeddings.kinds != table.tokenizer["inputs"]:
        raise DataError(
            f"{old} was made from {', '.join(table.tokenizer['inputs'])} embeddings, and "
            f"{', '.join(embeddings.kinds)} were given; give the same kinds by --embeddings (without any, it is those "
            "of the data set)"
        )
    items = ItemTable.load(options.data)
    matrices = load_matrices(embeddings, items, data=options.data, out=options.out)
    vectors = matrices[0] if fusion is None else FusedVectors(fusion, matrices)
    if vectors.shape[1] != tokenizer.dim:
        raise DataError(
            f"the tokenizer in {old} reads vectors of width {tokenizer.dim}, and {vectors.shape[1]} "
            "was given; give the embeddings it was made from"
        )
    rows = np.flatnonzero(~table.holds(items.item_ids))
    new_codes = np.empty((0, table.num_levels), dtype=np.int32)
    if len(rows):
        new_codes = codes_of_new_items(
            tokenizer,
            _Rows(vectors, rows),
            table.codes,
            method=table.tokenizer["collisions"],
            code_sizes=table.code_sizes,
        )
    larger = table.extended(items.item_ids, new_codes)
    logger.info("%d items keep their codes, %d are new", table.num_items, len(rows))
    report = measured(larger, tokenizer, vectors, items, options)
    return write_table(larger, tokenizer, fusion, report, options)


def import_table(
    options: TableOptions, *, sids: str, column: str | None, code_sizes: Sequence[int]
) -> "SemanticIdReport":
    """Take over published IDs; see `data_streams.published_ids`."""
    from data_streams.item_table import ItemTable
    from data_streams.published_ids import read_published

    open_out(options)
    items = ItemTable.load(options.data)
    table = read_published(sids, items.item_ids, column=column, code_sizes=code_sizes)
    return write_table(table, None, None, measured(table, None, None, items, options), options)


def show_reports(reports: Sequence["SemanticIdReport"], picture: Storage | None, name: str) -> None:
    """Print one table of several reports and draw them side by side."""
    from rich.console import Console

    from data_streams.semantic_id_report import plot, render

    Console().print(render(reports))
    if picture is not None:
        picture.write(name, plot(reports))
        print(f"Picture: {picture.path(name)}")


class _Rows:
    """Some rows of a matrix, as a matrix."""

    def __init__(self, vectors: Any, rows: Any):
        self.vectors, self.rows, self.shape = vectors, rows, (len(rows), vectors.shape[1])

    def __getitem__(self, chosen: Any) -> Any:
        return self.vectors[self.rows[chosen]]


def open_out(options: TableOptions) -> None:
    """Nothing of an older table is touched yet: what is read next may turn out unusable."""
    from data_streams.semantic_ids import HEADER_NAME

    storage = Storage(options.out)
    if storage.exists(HEADER_NAME) and not options.overwrite:
        raise ConfigError(
            f"--out must be a folder without semantic IDs, and {options.out} has some; name another one, or "
            "add --overwrite"
        )
    storage.make_directory()


def measured(
    table: "SemanticIdTable", tokenizer: Any, vectors: Any, items: "ItemTable", options: TableOptions
) -> "SemanticIdReport":
    from data_streams.semantic_id_report import category_codes, measure

    error = None
    if tokenizer is not None:
        from models.tokenizers.tokenizer import reconstruction_error

        error = reconstruction_error(tokenizer.decode, vectors, table.codes)
    categories = None
    if items.categories is not None:
        categories = category_codes(items.categories, options.category_level)
    return measure(
        table,
        name=Path(options.out.rstrip("/")).name,
        extra_level=table.tokenizer.get("collisions") == EXTRA_CODE,
        categories=categories,
        reconstruction_error=error,
    )


def write_table(
    table: "SemanticIdTable", tokenizer: Any, fusion: Any, report: "SemanticIdReport", options: TableOptions
) -> "SemanticIdReport":
    """Put a table that is ready in the place of an older one, and show its report."""
    from data_streams.semantic_id_report import PLOT_NAME
    from data_streams.semantic_ids import HEADER_NAME

    storage = Storage(options.out)
    # Without its header the old table is none, should this stop half way.
    storage.delete(HEADER_NAME)
    _save_tokenizer(tokenizer, storage)
    _save_fusion(fusion, storage)
    table.save(storage)
    report.save(storage)
    show_reports([report], storage, PLOT_NAME)
    print(f"{table.num_items:,} items in {options.out}, fingerprint {table.fingerprint}")
    return report


def _save_tokenizer(tokenizer: Any, storage: Storage) -> None:
    from models.tokenizers.tokenizer import CONFIG_NAME, STATE_NAME, save_tokenizer

    if tokenizer is None:
        # That of a table which was here before would encode new items by other codes.
        for name in (CONFIG_NAME, STATE_NAME):
            storage.delete(name)
    else:
        save_tokenizer(tokenizer, storage)


def _save_fusion(fusion: Any, storage: Storage) -> None:
    from safetensors.numpy import save

    if fusion is None:
        storage.delete(FUSION_NAME)
    else:
        storage.write(FUSION_NAME, save(fusion.arrays()))


def _load_fusion(storage: Storage) -> Any:
    from safetensors.numpy import load

    from data_streams.item_vectors import Fusion

    return Fusion.from_arrays(load(storage.read(FUSION_NAME))) if storage.exists(FUSION_NAME) else None
