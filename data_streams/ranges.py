"""Ranges that lie side by side in flat arrays."""

import numpy as np


def gather_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices of the ranges starts[i] .. starts[i] + lengths[i], one after another.

    Example: starts [7, 2], lengths [2, 3] give [7, 8, 2, 3, 4].
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - ends + lengths, lengths) + np.arange(total)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Shapes: [U] -> [U + 1] int64."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
