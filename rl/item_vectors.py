"""Unit vectors of items, and how near completions are to what a user has taken.

Shapes: B groups of G completions, E width of a vector.
"""

from collections.abc import Sequence

import numpy as np

from cluster.errors import ConfigError
from data_streams.item_table import ItemTable
from data_streams.item_vectors import read_matrix


class UnitVectors:
    """Vectors of length one, scaled when they are read; the matrix stays mapped into memory."""

    def __init__(self, matrix: np.ndarray):
        self.matrix = matrix

    @staticmethod
    def load(data_path: str, file: str | None) -> "UnitVectors":
        """The matrix in a file, or the data set's own embeddings.

        Raises: ConfigError if there is neither; DataError for a matrix of another catalogue.
        """
        items = ItemTable.load(data_path)
        if file is not None:
            return UnitVectors(read_matrix(file, items.num_items))
        if items.embeddings is None:
            raise ConfigError(
                f"the reward compares items by their vectors, and {data_path} has none: name a matrix with "
                "--rewards.NAME.vectors FILE.npy, NAME being diversity, relevance or hybrid.relevance (`grail "
                "tokenize` keeps the one it was given), or build the data with --embeddings"
            )
        return UnitVectors(items.embeddings)

    def __call__(self, items: np.ndarray) -> np.ndarray:
        """Zero vectors where there is no item. Shapes: [...] int64, -1 for none -> [..., E] float32."""
        vectors = np.asarray(self.matrix[np.maximum(items, 0)], dtype=np.float32)
        norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
        return np.where(items[..., None] >= 0, vectors / np.maximum(norms, 1e-12), 0.0)


def last_items(histories: Sequence[np.ndarray], length: int) -> np.ndarray:
    """The latest items of each history, -1 in front where there are fewer. Shapes: [B, length] int64."""
    found = np.full((len(histories), length), -1, dtype=np.int64)
    for row, history in zip(found, histories, strict=True):
        tail = history[-length:]
        row[length - len(tail) :] = tail
    return found


def relevance(vectors: UnitVectors, history: np.ndarray, items: np.ndarray, num_nearest: int) -> np.ndarray:
    """Mean cosine to the nearest items of a history; 0 for an illegal item or an empty history.

    With fewer items than `num_nearest` in the history, all of them count.

    Shapes: history [B, H], items [B, G], -1 for none -> [B, G] float32.
    """
    cosines = np.einsum("bge,bhe->bgh", vectors(items), vectors(history))
    cosines = np.where((history >= 0)[:, None, :], cosines, -np.inf)
    nearest = -np.sort(-cosines, axis=-1)[..., :num_nearest]
    is_real = np.isfinite(nearest)
    total = np.where(is_real, nearest, 0.0).sum(-1) / np.maximum(is_real.sum(-1), 1)
    return np.where(items >= 0, total, 0.0).astype(np.float32)
