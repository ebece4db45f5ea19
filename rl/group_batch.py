"""Groups as the batch that models read."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.errors import DataError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from rl.types import Group


def history_batch(groups: Sequence[Group], *, max_length: int, columns: Sequence[str] = ()) -> SequenceBatch:
    """The latest events of each group's user, at most `max_length`.

    Raises: DataError for a user without a history, or groups that lack a column the model reads.
    """
    empty = [group.user_row for group in groups if not len(group.history)]
    missing = [name for name in columns if name not in groups[0].history_features]
    if empty or missing:
        raise DataError(
            "a reward model needs a history of each user with the columns it was trained on, but "
            + (
                f"the history of user row {empty[0]} is empty"
                if empty
                else f"{', '.join(missing)} is missing"
            )
        )
    tails = [group.history[-max_length:] for group in groups]
    features = {
        name: torch.from_numpy(
            np.concatenate([group.history_features[name][-max_length:] for group in groups])
        )
        for name in columns
    }
    return SequenceBatch(
        user_ids=torch.tensor([group.user_row for group in groups]),
        items=Jagged.from_lengths(
            torch.from_numpy(np.concatenate(tails)), torch.tensor([len(tail) for tail in tails])
        ),
        features=features,
    )


def completed_items(groups: Sequence[Group]) -> Tensor:
    """Shapes: [B, G] int64, -1 for illegal paths."""
    return torch.from_numpy(np.stack([group.items for group in groups]))


def completed_paths(groups: Sequence[Group]) -> Tensor:
    """Shapes: [B, G, L] int64."""
    return torch.from_numpy(np.stack([group.paths for group in groups]))
