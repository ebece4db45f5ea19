"""Residual balanced k-means: every code of a level is used by equally many items, but for one.

Source: OneRec (2025), whose clusters hold |V| / K items each: the nearest remaining items are given to each
centroid, the centroids move, until nothing changes. Deviations: pairs of item and centroid are taken by growing
distance, so that no centroid chooses before another; centroids are learnt on a sample, and all items are then
assigned at once. An item that is added later takes the nearest codes, full or not.
"""

from dataclasses import dataclass

import numpy as np

from cluster.seeds import purpose_seed
from models.tokenizers.capacity import assign_within_capacity
from models.tokenizers.clustering import group_sums, kmeans, nearest
from models.tokenizers.tokenizer import (
    Codebooks,
    Matrix,
    Tokenizer,
    blocks,
    path_points,
    require_at_least,
    take_sample,
)


class BalancedKMeans(Tokenizer):
    """Centroids of each level stand for equally many of the items it is fitted to."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Codebooks):
        iterations: int = 10
        """Rounds of balanced assignment over the sample, after plain k-means; fewer where nothing changes."""
        sample_per_code: int = 256
        """Vectors in the sample, for each code of the largest level."""

        def __post_init__(self):
            super().__post_init__()
            require_at_least(self, iterations=0, sample_per_code=1)

        def build(self, *, dim: int) -> "BalancedKMeans":
            return BalancedKMeans(self, dim)

    def fit(self, vectors: Matrix) -> None:
        config = self.config
        residual = take_sample(
            vectors, max(config.code_sizes) * config.sample_per_code, purpose_seed(config.seed, "sample")
        )
        self.code_vectors = []
        for level, size in enumerate(config.code_sizes):
            centroids = kmeans(residual, size, seed=purpose_seed(config.seed, "k-means", level))
            codes = _assign(residual, centroids)
            for _ in range(config.iterations):
                centroids, before = _means(residual, codes, size), codes
                codes = _assign(residual, centroids)
                if (codes == before).all():
                    break
            self.code_vectors.append(centroids)
            residual -= centroids[codes]

    def assign(self, vectors: Matrix) -> np.ndarray:
        codes = np.empty((vectors.shape[0], len(self.code_vectors)), dtype=np.int32)
        for level, centroids in enumerate(self.code_vectors):
            codes[:, level] = _assign(_Residuals(vectors, codes[:, :level], self.code_vectors), centroids)
        return codes


class _Residuals:
    """What the first levels have left of each vector, computed when it is read."""

    def __init__(self, vectors: Matrix, codes: np.ndarray, code_vectors: list[np.ndarray]):
        self.vectors, self.codes, self.code_vectors = vectors, codes, code_vectors
        self.shape = vectors.shape

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        block = np.asarray(self.vectors[rows], dtype=np.float32)
        return block - path_points(self.codes[rows], self.code_vectors)


def _assign(points: Matrix, centroids: np.ndarray) -> np.ndarray:
    """N // K points for each centroid, and one more for those that most points are nearest to."""
    smaller, rest = divmod(points.shape[0], len(centroids))
    wanted = sum(
        np.bincount(nearest(block, centroids), minlength=len(centroids)) for _, block in blocks(points)
    )
    capacities = np.full(len(centroids), smaller)
    capacities[np.argsort(-wanted, kind="stable")[:rest]] += 1
    return assign_within_capacity(points, centroids, capacities)


def _means(points: np.ndarray, codes: np.ndarray, size: int) -> np.ndarray:
    sums, counts = group_sums(points, codes, size)
    return (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
