"""Which of a user's events a step learns to predict, for models that read the history before each by itself."""

from dataclasses import replace

from torch import Tensor

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged

PREDICTED = "predicted"
"""In `SequenceBatch.supervision`: places of the events behind which the next one is predicted."""


def with_newest(batch: SequenceBatch, count: int | None) -> SequenceBatch:
    """Predict the latest `count` events of each user, each from those before it; None predicts all. Host side."""
    lengths = batch.items.lengths
    places = batch.items.places()
    if count is not None:
        places = places[places >= lengths[batch.items.row_index()] - count]
        lengths = lengths.clamp(max=count)
    return replace(batch, supervision={**batch.supervision, PREDICTED: Jagged.from_lengths(places, lengths)})


def predicted_targets(batch: SequenceBatch) -> Tensor:
    """The items to be predicted. Shapes: [N] int64."""
    predicted = batch.supervision[PREDICTED]
    return batch.targets[batch.items.offsets[predicted.row_index()] + predicted.values]


def check_targets_per_user(count: int | None) -> None:
    """Raises: ConfigError where no event would be predicted."""
    if count is not None and count < 1:
        raise ConfigError(
            f"model.targets-per-user must be at least 1, got {count}; leave it out to predict every event"
        )
