"""Vectors around a tree of centres, for tests of tokenizers."""

import numpy as np


def clustered_vectors(num_items: int = 400, dim: int = 12, *, seed: int = 0) -> np.ndarray:
    """Shapes: [N, D] float32."""
    random = np.random.default_rng(seed)
    coarse, fine = random.normal(size=(6, dim)), 0.4 * random.normal(size=(6, dim))
    places = random.integers(0, 6, (2, num_items))
    noise = 0.1 * random.normal(size=(num_items, dim))
    return (coarse[places[0]] + fine[places[1]] + noise).astype(np.float32)
