"""Metrics of recommendation: of the rank of one held-out item per user, and of lists of recommended items.

Functions that end in `_at` give one number per user; `coverage_at` is a number of all users together.

Shapes: U users, N items; ranks [U], from 1, with halves where items are tied; lists [U, K] item rows, best
first, -1 for an empty slot.
"""

from collections.abc import Mapping

import numpy as np
import polars as pl
from scipy import sparse

from cluster.seeds import purpose_seed

_DRAWS_AT_A_TIME = 4_000_000


def recall_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """Whether the held-out item is among the first k. Shapes: [U] -> [U]."""
    return (ranks <= k).astype(np.float64)


def ndcg_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """1 / log2(rank + 1) within the first k: with one relevant item the ideal is 1. Shapes: [U] -> [U]."""
    return np.where(ranks <= k, 1 / np.log2(ranks.astype(np.float64) + 1), 0.0)


def reciprocal_rank(ranks: np.ndarray) -> np.ndarray:
    """Shapes: [U] -> [U]."""
    return 1 / ranks.astype(np.float64)


def coverage_at(lists: np.ndarray, k: int, num_items: int) -> float:
    """Share of the catalogue that stands in at least one user's first k. Shapes: lists [U, K], -1 for none."""
    shown = np.unique(lists[:, :k])
    return float((shown >= 0).sum() / num_items)


def head_items(train_counts: np.ndarray, share: float = 0.2) -> np.ndarray:
    """The share of the catalogue with most training events; ties go to the earlier row. Shapes: [N] -> [N] bool."""
    head = np.zeros(len(train_counts), dtype=bool)
    head[np.argsort(-train_counts, kind="stable")[: int(np.ceil(share * len(head)))]] = True
    return head


def novelty_at(lists: np.ndarray, k: int, train_counts: np.ndarray) -> np.ndarray:
    """Mean of -log2 of the items' share of all training events; an item without any counts as one event.

    The usual novelty takes the share of users instead, which is larger by the events of a user. Empty slots count for
    nothing. Units: bits; an item twice as rare adds one. Shapes: lists [U, K], train_counts [N] -> [U].
    """
    counts = np.maximum(train_counts, 1)
    information = -np.log2(counts / max(train_counts.sum(), 1))
    shown, lists = lists[:, :k] >= 0, np.maximum(lists[:, :k], 0)
    return np.where(shown, information[lists], 0.0).sum(1) / np.maximum(shown.sum(1), 1)


def diversity_at(lists: np.ndarray, k: int, vectors: np.ndarray | sparse.csr_matrix) -> np.ndarray:
    """1 - mean cosine of all pairs in the first k; 0 for lists of fewer than two.

    A zero vector is unlike any other.

    Shapes: lists [U, K], vectors [N, E] of length one (or zero) -> [U].
    """
    lists = lists[:, :k]
    shown = lists >= 0
    lengths = shown.sum(1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ones = np.ones(offsets[-1], dtype=np.float32)
    chosen = sparse.csr_matrix((ones, lists[shown], offsets), shape=(len(lists), vectors.shape[0]))
    total = chosen @ vectors
    # |sum of vectors|^2 holds every pair twice, and each vector with itself.
    squared = total.multiply(total) if sparse.issparse(total) else total**2
    itself = vectors.multiply(vectors) if sparse.issparse(vectors) else vectors**2
    twice_pairs = _row_sums(squared) - chosen @ _row_sums(itself)
    pairs = lengths * (lengths - 1)
    return np.where(pairs > 0, 1 - twice_pairs / np.maximum(pairs, 1), 0.0)


def share_met_at(lists: np.ndarray, met: np.ndarray, k: int) -> np.ndarray:
    """Share of the first k items that meet a condition; 0 for an empty list. Shapes: [U, K] each -> [U]."""
    return met[:, :k].sum(1) / np.maximum((lists[:, :k] >= 0).sum(1), 1)


def unit_vectors(embeddings: np.ndarray) -> np.ndarray:
    """Vectors scaled to length one in fp32; zero ones stay. Shapes: [N, E] -> [N, E]."""
    vectors = np.asarray(embeddings, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def category_vectors(categories: pl.Series) -> sparse.csr_matrix:
    """A unit vector per item over all C categories. Shapes: [N] text or lists of it -> [N, C]."""
    frame = pl.DataFrame({"category": categories}).with_row_index("item")
    while isinstance(frame.schema["category"], pl.List | pl.Array):
        frame = frame.explode("category")
    frame = frame.drop_nulls().unique(maintain_order=True)
    column = frame["category"].rank("dense").cast(pl.Int64).to_numpy() - 1
    item = frame["item"].cast(pl.Int64).to_numpy()
    per_item = np.bincount(item, minlength=len(categories))
    weight = (1 / np.sqrt(per_item[item])).astype(np.float32)
    return sparse.csr_matrix(
        (weight, (item, column)), shape=(len(categories), max(column.max(initial=-1) + 1, 1))
    )


def bootstrap_intervals(
    per_user: Mapping[str, np.ndarray], *, resamples: int, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % intervals of the means over users, who are drawn anew with replacement each time.

    Shapes: per_user [U] each.
    """
    values = np.stack(list(per_user.values()), axis=1)
    low, high = np.percentile(resampled_means(values, resamples=resamples, seed=seed), [2.5, 97.5], axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(per_user)}


def resampled_means(values: np.ndarray, *, resamples: int, seed: int = 0) -> np.ndarray:
    """Means over users drawn with replacement, the same users in all columns.

    Shapes: [U, C] -> [resamples, C]. Cost: one random number per user and resample.
    """
    values, num_users = values.astype(np.float32), len(values)
    random = np.random.default_rng(purpose_seed(seed, "bootstrap"))
    at_a_time = max(_DRAWS_AT_A_TIME // num_users, 1)
    means = []
    for first in range(0, resamples, at_a_time):
        rows = min(at_a_time, resamples - first)
        drawn = random.integers(num_users, size=(rows, num_users), dtype=np.int32).astype(np.int64)
        drawn += num_users * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * num_users).reshape(rows, num_users)
        means.append(times.astype(np.float32) @ values / num_users)
    return np.concatenate(means)


def _row_sums(matrix: np.ndarray | sparse.csr_matrix) -> np.ndarray:
    return np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()
