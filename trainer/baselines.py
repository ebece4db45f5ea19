"""What any model must beat, measured by the same evaluation: popularity and item-to-item statistics.

They know the training events of all users (exposures do not count) and run on one process.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from cluster.storage import Storage
from data_streams.batch import SequenceBatch
from data_streams.configuration import DataConfig
from data_streams.evaluation_stream import EvaluationStream
from data_streams.item_table import ItemTable
from data_streams.manifest import Manifest
from data_streams.shards import Chunk, read_chunk
from trainer.configuration import EvaluationConfig
from trainer.evaluate import EvaluationResult, Utilities, evaluate
from trainer.search import Scorer, ScorerSearch

RECENT_ITEMS = 5
"""Last items of a history that the transition baseline looks at."""
RECENCY_DECAY = 0.5
"""Weight of each of them against the one after it."""
_SCORES_AT_A_TIME = 2**23


@dataclass(frozen=True, kw_only=True)
class TrainingEvents:
    """All training events but exposures, those of a user side by side and oldest first. Shapes: T events."""

    users: np.ndarray
    """[T] int64 user rows."""
    items: np.ndarray
    """[T] int64 item rows."""
    num_items: int

    def counts(self) -> np.ndarray:
        """Shapes: [N]."""
        return np.bincount(self.items, minlength=self.num_items)


def read_training_events(path: str, *, least_users: int | None = None) -> TrainingEvents:
    """Of all users, or of the first chunks (users lie in them by a hash) that hold so many with two events.

    Raises: DataError where the shards cannot be read.
    """
    storage = Storage(path)
    manifest = Manifest.load(storage)
    columns = ("action",) if "action" in manifest.columns else ()
    beside = manifest.beside_codes()
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for record in manifest.chunks:
        parts.append(_training_part(read_chunk(storage, record, manifest=manifest, columns=columns), beside))
        if least_users is not None:
            least_users -= int((np.unique(parts[-1][0], return_counts=True)[1] >= 2).sum())
            if least_users <= 0:
                break
    users, items = (np.concatenate([part[i] for part in parts]) for i in range(2))
    return TrainingEvents(users=users, items=items, num_items=manifest.num_items)


def _training_part(chunk: Chunk, beside: list[int]) -> tuple[np.ndarray, np.ndarray]:
    user = chunk.user_index
    kept = chunk.places < chunk.train_end[user]
    if beside:
        kept &= ~np.isin(chunk.columns["action"], beside)
    return chunk.users[user[kept]].astype(np.int64), chunk.items[kept].astype(np.int64)


def popularity(events: TrainingEvents) -> Scorer:
    """Every user gets the items with the most training events."""
    counts = torch.from_numpy(events.counts().astype(np.float32))
    return lambda batch: counts.expand(batch.num_users, -1)


def transitions(events: TrainingEvents) -> Scorer:
    """How often an item came right after one of the user's last items, as a share; later ones count more."""
    same_user = events.users[1:] == events.users[:-1]
    follows = _count_pairs(events.items[:-1][same_user], events.items[1:][same_user], events.num_items)
    totals = np.asarray(follows.sum(axis=1)).ravel()
    follows = sparse.diags_array(1 / np.maximum(totals, 1)) @ follows

    def score(batch: SequenceBatch) -> Tensor:
        age = batch.items.offsets[1:][batch.items.row_index()] - 1 - torch.arange(batch.num_tokens)
        weights = torch.where(age < RECENT_ITEMS, RECENCY_DECAY ** age.double(), 0.0)
        return _dense(_histories(batch, weights.numpy(), events.num_items) @ follows)

    return score


def cooccurrence(events: TrainingEvents) -> Scorer:
    """In how many training histories an item stands together with those of the user: cosines, summed up."""
    present = sparse.csr_array(
        (np.ones(len(events.items), dtype=np.float32), (events.users, events.items)),
        shape=(events.users.max(initial=0) + 1, events.num_items),
    )
    present.data[:] = 1
    together = sparse.csr_array(present.T @ present)
    scale = sparse.diags_array(1 / np.sqrt(np.maximum(together.diagonal(), 1)))
    together.setdiag(0)
    cosine = sparse.csr_array(scale @ together @ scale)

    def score(batch: SequenceBatch) -> Tensor:
        return _dense(_histories(batch, np.ones(batch.num_tokens), events.num_items) @ cosine)

    return score


def evaluate_baselines(
    data: DataConfig,
    config: EvaluationConfig,
    *,
    split: str,
    oracle: Scorer | None = None,
    utilities: Utilities | None = None,
) -> dict[str, EvaluationResult]:
    """popularity, co-occurrence, transitions and (where given) the oracle, evaluated like a model."""
    events, items = read_training_events(data.path), ItemTable.load(data.path)
    scorers = {
        "popularity": popularity(events),
        "co-occurrence": cooccurrence(events),
        "transitions": transitions(events),
    }
    if oracle is not None:
        scorers["oracle"] = oracle
    users_per_batch = max(min(config.users_per_batch, _SCORES_AT_A_TIME // events.num_items), 1)
    # Baselines read items alone, whatever further columns the model asks for.
    stream = EvaluationStream(
        replace(data, columns=()),
        split=split,
        rank=0,
        world_size=1,
        users_per_batch=users_per_batch,
        user_share=config.user_share,
        held_out_action=config.held_out_action,
    )
    return {
        name: evaluate(
            ScorerSearch(scorer, events.num_items),
            stream.batches(),
            empty_batch=stream.empty_batch(),
            items=items,
            config=config,
            split=split,
            utilities=utilities,
        )
        for name, scorer in scorers.items()
    }


def _count_pairs(first: np.ndarray, second: np.ndarray, num_items: int) -> sparse.csr_array:
    ones = np.ones(len(first), dtype=np.float32)
    return sparse.csr_array((ones, (first, second)), shape=(num_items, num_items))


def _histories(batch: SequenceBatch, weights: np.ndarray, num_items: int) -> sparse.csr_array:
    """Shapes: weights [T] -> [B, N]."""
    cells = (weights.astype(np.float32), batch.items.values.numpy(), batch.items.offsets.numpy())
    return sparse.csr_array(cells, shape=(batch.num_users, num_items))


def _dense(scores: sparse.csr_array) -> Tensor:
    return torch.from_numpy(scores.toarray().astype(np.float32, copy=False))
