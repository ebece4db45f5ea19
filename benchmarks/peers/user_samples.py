"""The peer of the stream: WebDataset as its documentation uses it, one sample per user, padded in the collation."""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import webdataset
from torch import Tensor

from data_streams.batch import SequenceBatch

USERS_PER_SHARD = 10_000
SHUFFLED_USERS = 1_000


def write_user_samples(batches: Iterable[SequenceBatch], folder: Path) -> list[str]:
    """The training sequence of every user of some batches as a sample of its own -> paths of the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    pattern = str(folder / "users-%05d.tar")
    with webdataset.ShardWriter(pattern, maxcount=USERS_PER_SHARD, verbose=0, encoder=False) as writer:
        for batch in batches:
            bounds = batch.items.offsets.tolist()
            for user, start, stop in zip(batch.user_ids.tolist(), bounds[:-1], bounds[1:], strict=True):
                sequence = torch.cat((batch.items.values[start:stop], batch.targets[stop - 1 : stop]))
                content = io.BytesIO()
                np.save(content, sequence.numpy(), allow_pickle=False)
                writer.write({"__key__": f"{user:09d}", "npy": content.getvalue()})
    return sorted(str(path) for path in folder.glob("*.tar"))


def padded_batches(shards: Sequence[str], users_per_batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(items, targets, mask) of every batch, [B, longest] each."""
    samples = webdataset.WebDataset(list(shards), shardshuffle=False).shuffle(SHUFFLED_USERS)
    batches = samples.to_tuple("npy").map_tuple(_decode).batched(users_per_batch, collation_fn=_collate)
    return iter(batches)


def _decode(data: bytes) -> Tensor:
    return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))


def _collate(samples: list[tuple[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    sequences = [sequence for (sequence,) in samples]
    lengths = torch.tensor([len(sequence) - 1 for sequence in sequences])
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    return padded[:, :-1], padded[:, 1:], torch.arange(padded.shape[1] - 1) < lengths[:, None]
