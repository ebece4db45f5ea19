"""Matrices of item vectors on disk, and several of them fused into one.

Shapes: N items, D_i width of input i, W_i the width it is reduced to.
"""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import ConfigError, DataError

BLOCK_ROWS = 65_536


def read_matrix(path: str, num_items: int) -> np.ndarray:
    """A .npy matrix with a vector per item, mapped into memory, not read. Shapes: [N, D].

    Raises: DataError when it is missing, no array, of another number of items or not of real numbers.
    """
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(f"item vectors must be an existing .npy file, and {path} is none") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a plain NumPy array ({error}); write it with numpy.save") from error
    if not isinstance(matrix, np.ndarray):
        matrix.close()
        raise DataError(
            f"item vectors must be the .npy file of one matrix, and {path} is an archive of several (.npz); write "
            "the one that is meant with numpy.save"
        )
    require_shape(matrix, num_items, path)
    return matrix


def require_shape(matrix: np.ndarray, num_items: int, name: str) -> None:
    """Raises: DataError unless there is one vector of real numbers per item."""
    if matrix.ndim != 2 or matrix.shape[0] != num_items or matrix.dtype.kind != "f" or not matrix.shape[1]:
        raise DataError(
            f"{name} must hold one vector of real numbers for each of the {num_items} items, in their order, "
            f"and is {matrix.dtype} {matrix.shape}; give a matrix of this catalogue"
        )


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """How several inputs become one: each is centred, turned to its main axes (PCA), cut and scaled.

    With whitening every kept axis has the same variance, without it axes keep their relative variance. Either way
    input i has the total variance weight_i ** 2 before the results are laid side by side, so that with equal
    weights a wide or long-vectored input counts no more than another.
    """

    means: tuple[np.ndarray, ...]
    """Per input [D_i] float32."""
    projections: tuple[np.ndarray, ...]
    """Per input [D_i, W_i] float32, scale and weight included."""

    @staticmethod
    def fit(
        matrices: Sequence[np.ndarray], *, widths: Sequence[int], weights: Sequence[float], whiten: bool
    ) -> "Fusion":
        """Reads every matrix once, in blocks.

        Raises: ConfigError when widths or weights do not fit the inputs; DataError for vectors that are not finite,
            or all equal.
        """
        if len(weights) != len(matrices) or min(weights) <= 0:
            raise ConfigError(
                f"--embeddings.weights must be one positive number for each of {len(matrices)} inputs, got "
                f"{tuple(weights)}"
            )
        fitted = []
        for matrix, width, weight in zip(matrices, widths, weights, strict=True):
            if not 1 <= width <= matrix.shape[1]:
                raise ConfigError(
                    f"--embeddings.width must be 1 to the width of the input, {matrix.shape[1]}, got {width}"
                )
            fitted.append(_main_axes(matrix, width, weight, whiten))
        means, projections = zip(*fitted, strict=True)
        return Fusion(means=means, projections=projections)

    def arrays(self) -> dict[str, np.ndarray]:
        named = {f"means.{index}": mean for index, mean in enumerate(self.means)}
        return named | {f"projections.{index}": array for index, array in enumerate(self.projections)}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> "Fusion":
        count = len(arrays) // 2
        return Fusion(
            means=tuple(arrays[f"means.{index}"] for index in range(count)),
            projections=tuple(arrays[f"projections.{index}"] for index in range(count)),
        )


class FusedVectors:
    """The fused vectors of a catalogue, computed when they are read. Shapes: [N, sum of W_i] float32."""

    def __init__(self, fusion: Fusion, matrices: Sequence[np.ndarray]):
        given = [matrix.shape[1] for matrix in matrices]
        fitted = [len(mean) for mean in fusion.means]
        if given != fitted:
            raise DataError(
                f"the inputs must have the widths {fitted} that they were fused with, and have {given}; give "
                "the same kinds of embeddings"
            )
        self.fusion, self.matrices = fusion, matrices
        width = sum(projection.shape[1] for projection in fusion.projections)
        self.shape = (matrices[0].shape[0], width)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        parts = [
            (np.asarray(matrix[rows], dtype=np.float32) - mean) @ projection
            for matrix, mean, projection in zip(
                self.matrices, self.fusion.means, self.fusion.projections, strict=True
            )
        ]
        return np.concatenate(parts, axis=1)


def _main_axes(matrix: np.ndarray, width: int, weight: float, whiten: bool) -> tuple[np.ndarray, np.ndarray]:
    total, products = np.zeros(matrix.shape[1]), np.zeros((matrix.shape[1], matrix.shape[1]))
    for start in range(0, len(matrix), BLOCK_ROWS):
        block = np.asarray(matrix[start : start + BLOCK_ROWS], dtype=np.float64)
        if not np.isfinite(block).all():
            row = start + int((~np.isfinite(block).all(axis=1)).argmax())
            raise DataError(f"item vectors must be finite numbers, and row {row} is not; mend the matrix")
        total += block.sum(axis=0)
        products += block.T @ block
    mean = total / len(matrix)
    variances, axes = np.linalg.eigh(products / len(matrix) - np.outer(mean, mean))
    variances, axes = variances[::-1][:width], axes[:, ::-1][:, :width]
    # What is left of equal vectors is the rounding of their squares, some 1e-14 of them, or nothing at all.
    if variances[0] <= 1e-12 * np.trace(products) / len(matrix):
        raise DataError(
            f"item vectors must differ to have main axes, and all {len(matrix)} of an input of width "
            f"{matrix.shape[1]} are equal; leave that input out, or give another one"
        )
    # An axis without variance carries nothing; dividing by it would blow up rounding errors.
    is_real = variances > 1e-9 * variances[0]
    if whiten:
        scale = np.where(is_real, 1 / np.sqrt(np.where(is_real, variances, 1)), 0) / np.sqrt(is_real.sum())
    else:
        scale = np.where(is_real, 1 / np.sqrt(variances[is_real].sum()), 0)
    # The sign of an axis is arbitrary: its largest entry is made positive.
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(width)])
    return mean.astype(np.float32), (axes * signs * scale * weight).astype(np.float32)
