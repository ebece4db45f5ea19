"""Random codes: the baseline that shows what the content in semantic IDs is worth."""

from dataclasses import dataclass

import numpy as np

from cluster.seeds import purpose_seed
from models.tokenizers.tokenizer import Codebooks, Matrix, Tokenizer, blocks


class RandomCodes(Tokenizer):
    """Codes drawn from a hash of the vector's bits, so that an item has the same ones wherever it stands.

    Points are L uniform numbers; code k of a level is the middle of the k-th of K_l equal intervals. Items with
    equal vectors have equal codes.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Codebooks):
        def build(self, *, dim: int) -> "RandomCodes":
            return RandomCodes(self, dim)

    def __init__(self, config: Config, dim: int):
        super().__init__(config, dim)
        random = np.random.default_rng(purpose_seed(config.seed, "random codes"))
        self.keys = random.integers(0, 2**64, (dim, len(config.code_sizes)), dtype=np.uint64) | np.uint64(1)
        self.mean = np.zeros(dim, dtype=np.float32)

    def fit(self, vectors: Matrix) -> None:
        total = sum(block.sum(axis=0, dtype=np.float64) for _, block in blocks(vectors))
        self.mean = (total / vectors.shape[0]).astype(np.float32)
        sizes = self.config.code_sizes
        self.code_vectors = [np.zeros((size, len(sizes)), dtype=np.float32) for size in sizes]
        for level, size in enumerate(sizes):
            self.code_vectors[level][:, level] = (np.arange(size) + 0.5) / size

    def project(self, vectors: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(vectors, dtype=np.float32).view(np.uint32).astype(np.uint64)
        mixed = bits @ self.keys  # modulo 2 ** 64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return ((mixed >> np.uint64(40)) / np.float32(2**24)).astype(np.float32)

    def unproject(self, points: np.ndarray) -> np.ndarray:
        """The mean vector: random codes say nothing about an item."""
        return np.broadcast_to(self.mean, (len(points), self.dim))

    def arrays(self) -> dict[str, np.ndarray]:
        return {"mean": self.mean}

    def set_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        self.mean = arrays["mean"]
