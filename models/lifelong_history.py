"""Long histories thinned out: events are clustered, and the one nearest to each centre stands for its cluster.

Source: OneRec Technical Report (arXiv 2506.13695): hierarchical k-means with floor(cube root of n) clusters for n
events, again within each until a cluster holds no more than a threshold. RECONSTRUCTED: the vectors, fixed random
ones of the items' codes that weigh half as much from level to level, so that items are near whose codes begin alike.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.kernels.context_attention import NEVER
from models.layers.pathways import positive_feedback
from models.predicted_events import PREDICTED

KEPT = "lifelong"
"""In `SequenceBatch.supervision`: whether each event of a user stands for a cluster."""
VECTOR_SIZE = 16
ROUNDS = 5
"""Of Lloyd's algorithm at each split."""


@dataclass(frozen=True, kw_only=True)
class LifelongConfig:
    """How a history that is too long to be encoded is read: by queries, and thinned out before."""

    num_queries: int = 0
    """Learned queries that stand for the whole history in the encoder; 0 gives it the events themselves."""
    num_blocks: int = 2
    """Blocks of the queries (QFormer)."""
    hidden: int = 512
    """Size of the gated hidden layer of these blocks."""
    cluster_events: int = 0
    """Events above which similar ones are clustered, and one stands for them; 0 keeps all."""
    max_events: int = 2000
    """Most events that the queries read, the latest ones before each target, and the first of all."""

    def __post_init__(self) -> None:
        if min(self.num_queries, self.cluster_events) < 0 or min(self.num_blocks, self.max_events) < 1:
            raise ConfigError(
                "num-queries and cluster-events of a lifelong history must be 0 or more, num-blocks and max-events 1 "
                f"or more, got {self.num_queries}, {self.cluster_events}, {self.num_blocks} and {self.max_events}"
            )
        if self.cluster_events and not self.num_queries:
            raise ConfigError(
                "events are clustered for the queries of a lifelong history, and there are none; set num-queries too, "
                "or leave cluster-events out"
            )


def with_lifelong(batch: SequenceBatch, config: LifelongConfig, code_vectors: np.ndarray) -> SequenceBatch:
    """Says which events the queries may read; always the first one, so that there is one for every target. Host side.

    Clustered are the events that a user's earliest target knows of; what follows them is read event by event, since
    no target may depend on events after it.

    Shapes: code_vectors [N, d] of all items.
    """
    items = batch.items
    rows, places = items.row_index().numpy(), items.places().numpy()
    kept = np.ones(items.values.shape[0], dtype=bool)
    if config.cluster_events and items.max_length > config.cluster_events:
        early = places <= _first_predicted(batch)[rows]
        vectors = code_vectors[items.values.numpy()[early]]
        kept[early] = representatives(vectors, rows[early], config.cluster_events)
    kept |= places == 0
    return replace(batch, supervision={**batch.supervision, KEPT: items.with_values(torch.from_numpy(kept))})


def _first_predicted(batch: SequenceBatch) -> np.ndarray:
    """The last place that a user's earliest target knows of, or -1 for users without any. Shapes: [B]."""
    predicted = batch.supervision[PREDICTED]
    offsets, values = predicted.offsets.numpy(), predicted.values.numpy()
    return np.append(values, -1)[np.where(np.diff(offsets) > 0, offsets[:-1], len(values))]


def lifelong_span(items: Jagged, kept: Jagged, max_events: int) -> tuple[Tensor, Tensor]:
    """Since and until of what the queries read: at each target the latest of the events kept, and the first one.

    Shapes: items and kept [T] -> 2 x [T].
    """
    since, until = positive_feedback(items, kept.values, max_events)
    return since, torch.where(items.places() == 0, NEVER, until)


def item_vectors(codes: np.ndarray, code_sizes: tuple[int, ...]) -> np.ndarray:
    """Shapes: codes [N, L] -> [N, d] float32."""
    random, vectors = np.random.default_rng(0), np.zeros((len(codes), VECTOR_SIZE), dtype=np.float32)
    for level, size in enumerate(code_sizes):
        vectors += 0.5**level * random.standard_normal((size, VECTOR_SIZE), dtype=np.float32)[codes[:, level]]
    return vectors


def representatives(vectors: np.ndarray, groups: np.ndarray, threshold: int) -> np.ndarray:
    """Of every cluster the event nearest to its centre, the first of equally near ones.

    Shapes: vectors [T, d], groups [T] that are clustered apart, ascending -> [T] bool.
    """
    clusters = np.unique(groups, return_inverse=True)[1]
    done = np.zeros(0, dtype=bool)
    while True:
        sizes = np.bincount(clusters)
        done = np.pad(done, (0, len(sizes) - len(done)))
        splits = (sizes > threshold) & ~done
        if not splits.any():
            break
        clusters, done = _split(vectors, clusters, splits, done)
    centres = _means(vectors, clusters, np.bincount(clusters).size)
    away = ((vectors - centres[clusters]) ** 2).sum(1)
    order = np.lexsort((np.arange(len(away)), away, clusters))
    kept = np.zeros(len(vectors), dtype=bool)
    kept[order[np.unique(clusters[order], return_index=True)[1]]] = True
    return kept


def _split(
    vectors: np.ndarray, clusters: np.ndarray, splits: np.ndarray, done: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Each cluster that `splits` into floor(cube root of its size) others; one that cannot be split is done."""
    events = np.flatnonzero(splits[clusters])
    events = events[np.argsort(clusters[events], kind="stable")]
    number, sizes = np.unique(clusters[events], return_inverse=True, return_counts=True)[1:]
    parts = np.maximum(np.floor(np.cbrt(sizes) + 1e-9).astype(np.int64), 2)
    firsts, starts = np.cumsum(parts) - parts, np.cumsum(sizes) - sizes
    within = np.arange(parts.sum()) - np.repeat(firsts, parts)
    # Begin with events that are evenly spread over the history.
    seeds = np.repeat(starts, parts) + within * np.repeat(sizes, parts) // np.repeat(parts, parts)
    own, centres = vectors[events], vectors[events[seeds]]
    for _ in range(ROUNDS):
        chosen = firsts[number] + _nearest(own, centres, firsts[number], parts[number])
        found = np.bincount(chosen, minlength=len(centres)) > 0
        centres = np.where(found[:, None], _means(own, chosen, len(centres)), centres)
    is_whole = np.bincount(number[np.unique(chosen, return_index=True)[1]], minlength=len(parts)) == 1
    done[clusters[events[starts]][is_whole]] = True
    later = len(splits) + chosen
    joined = clusters.copy()
    joined[events] = np.where(is_whole[number], clusters[events], later)
    used, renumbered = np.unique(joined, return_inverse=True)
    return renumbered, np.where(
        used < len(splits), np.append(done, False)[np.minimum(used, len(splits))], False
    )


def _nearest(points: np.ndarray, centres: np.ndarray, firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which of its own centres first..first+count is nearest to each point, from 0. Shapes: [n, d] -> [n]."""
    starts = np.cumsum(counts) - counts
    point = np.repeat(np.arange(len(points)), counts)
    within = np.arange(len(point)) - starts[point]
    away = ((points[point] - centres[firsts[point] + within]) ** 2).sum(1)
    least = np.minimum.reduceat(away, starts)
    return np.minimum.reduceat(np.where(away == least[point], within, len(centres)), starts)


def _means(points: np.ndarray, clusters: np.ndarray, count: int) -> np.ndarray:
    sums = np.zeros((count, points.shape[1]))
    np.add.at(sums, clusters, points)
    return (sums / np.maximum(np.bincount(clusters, minlength=count), 1)[:, None]).astype(np.float32)
