"""K-means and nearest neighbours by faiss, and sums over groups, on points that fit into memory."""

import faiss
import numpy as np
import torch
from scipy.sparse import csr_matrix

from cluster.errors import ConfigError

ITERATIONS = 25


def _share_threads() -> None:
    """Give faiss as many threads as torch has: both bring a thread pool of their own."""
    faiss.omp_set_num_threads(torch.get_num_threads())


def nearest(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The nearest centroid of each point, by Euclidean distance. Shapes: [n, d], [K, d] -> [n] int64."""
    return nearest_few(points, centroids, 1)[0][:, 0]


def nearest_few(points: np.ndarray, centroids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Centroids of each point, nearest first, and their squared distances. Shapes: [n, count] each."""
    _share_threads()
    distances, found = faiss.knn(np.ascontiguousarray(points), np.ascontiguousarray(centroids), count)
    return found, distances


def kmeans(points: np.ndarray, num_clusters: int, *, seed: int, iterations: int = ITERATIONS) -> np.ndarray:
    """Centroids of all given points. Shapes: [n, d] -> [K, d] float32.

    Raises: ConfigError with fewer points than clusters.
    """
    if len(points) < num_clusters:
        raise ConfigError(
            f"{num_clusters} codes need at least as many items, and there are {len(points)}; lower --code-sizes"
        )
    _share_threads()
    clustering = faiss.Kmeans(
        points.shape[1],
        num_clusters,
        niter=iterations,
        seed=seed % 2**31,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),
    )
    clustering.train(np.ascontiguousarray(points, dtype=np.float32))
    return clustering.centroids


def group_sums(points: np.ndarray, groups: np.ndarray, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum and size of each group. Shapes: points [n, d], groups [n] -> [K, d] float64, [K] int64."""
    members = csr_matrix(
        (np.ones(len(points)), (groups, np.arange(len(points)))), shape=(num_groups, len(points))
    )
    return members @ points, np.bincount(groups, minlength=num_groups)


def squared_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Shapes: [n, d], [K, d] -> [n, K] float32."""
    squares = np.square(points).sum(axis=1)[:, None] + np.square(centroids).sum(axis=1)
    return np.maximum(squares - 2 * points @ centroids.T, 0)
