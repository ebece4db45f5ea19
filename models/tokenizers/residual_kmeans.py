"""Residual k-means: each level clusters what the levels before it have left.

A sample is clustered by faiss; passes over all vectors, in blocks, then move the centroids to the means of all
their points. Nothing but the sample, one block and the codes is in memory.
"""

from dataclasses import dataclass

import numpy as np

from cluster.seeds import purpose_seed
from models.tokenizers.clustering import ITERATIONS, group_sums, kmeans
from models.tokenizers.tokenizer import (
    Codebooks,
    Matrix,
    Tokenizer,
    blocks,
    greedy_codes,
    path_points,
    require_at_least,
    take_sample,
)


class ResidualKMeans(Tokenizer):
    """Centroids of each level, found on a sample and moved by all vectors."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Codebooks):
        iterations: int = ITERATIONS
        """Rounds of k-means over the sample."""
        sample_per_code: int = 256
        """Vectors in the sample, for each code of the largest level."""
        passes: int = 1
        """Rounds over all vectors afterwards, for each level; none where the sample is all of them."""

        def __post_init__(self):
            super().__post_init__()
            require_at_least(self, iterations=0, sample_per_code=1, passes=0)

        def build(self, *, dim: int) -> "ResidualKMeans":
            return ResidualKMeans(self, dim)

    def fit(self, vectors: Matrix) -> None:
        config = self.config
        residual = take_sample(
            vectors, max(config.code_sizes) * config.sample_per_code, purpose_seed(config.seed, "sample")
        )
        self.code_vectors = []
        for level, size in enumerate(config.code_sizes):
            seed = purpose_seed(config.seed, "k-means", level)
            self.code_vectors.append(kmeans(residual, size, seed=seed, iterations=config.iterations))
            if len(residual) < vectors.shape[0]:
                for _ in range(config.passes):
                    self._move_centroids(vectors)
            residual -= self.code_vectors[-1][greedy_codes(residual, self.code_vectors[-1:])[:, 0]]

    def _move_centroids(self, vectors: Matrix) -> None:
        """One round of Lloyd's algorithm for the last level, over all vectors; empty clusters stay."""
        last = self.code_vectors[-1]
        sums, counts = np.zeros(last.shape), np.zeros(len(last), dtype=np.int64)
        for _, block in blocks(vectors):
            codes = greedy_codes(block, self.code_vectors)
            residual = block - path_points(codes[:, :-1], self.code_vectors)
            for total, part in zip(
                (sums, counts), group_sums(residual, codes[:, -1], len(last)), strict=True
            ):
                total += part
        used = counts > 0
        last[used] = sums[used] / counts[used, None]
