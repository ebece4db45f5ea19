"""What a model may know of an event: the item, how it was answered, how long it was played."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

ACTION, PLAY_TIME, DURATION = "action", "play_time_s", "duration_s"
NUM_BUCKETS = 16
"""Of play times in powers of two seconds, and of played shares in tenths (the first is for unknown ones)."""


class EventFeatures(nn.Module):
    """Parts of an event side by side: given vectors of its item, and embedded feedback of the user."""

    def __init__(self, *, widths: Sequence[int], num_actions: int, play_time: bool, feedback_width: int):
        """`widths` are those of the vectors that `forward` is given; without actions their number is 0."""
        super().__init__()
        self.width = sum(widths) + feedback_width * (bool(num_actions) + 2 * play_time)
        self.actions = nn.Embedding(num_actions, feedback_width) if num_actions else None
        self.play_times = nn.Embedding(NUM_BUCKETS, feedback_width) if play_time else None
        self.played_shares = nn.Embedding(NUM_BUCKETS, feedback_width) if play_time else None

    def forward(self, vectors: Sequence[Tensor], columns: Mapping[str, Tensor]) -> Tensor:
        """Shapes: vectors [T, ...], columns [T] each -> [T, width]."""
        parts = list(vectors)
        if self.actions is not None:
            parts.append(self.actions(columns[ACTION].long()))
        if self.play_times is not None:
            parts.append(self.play_times(play_time_bucket(columns[PLAY_TIME])))
            parts.append(self.played_shares(played_share_bucket(columns[PLAY_TIME], columns[DURATION])))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def play_time_bucket(play_time_s: Tensor) -> Tensor:
    """0 where it is not known, else 1 + floor(log2(1 + s)), at most 15. Example: 0 s -> 1, 3 s -> 3, 100 s -> 7."""
    known = play_time_s >= 0
    bucket = 1 + torch.log2(1 + play_time_s.float().clamp(min=0)).floor().long()
    return torch.where(known, bucket.clamp(max=NUM_BUCKETS - 1), 0)


def played_share_bucket(play_time_s: Tensor, duration_s: Tensor) -> Tensor:
    """0 where it is not known, else 1 + tenths, at most 15. Example: 30 s of 60 s -> 6."""
    known = (play_time_s >= 0) & (duration_s > 0)
    tenths = (10 * play_time_s.float() / duration_s.float().clamp(min=1e-6)).floor().clamp(0, NUM_BUCKETS - 2)
    return torch.where(known, 1 + tenths.long(), 0)
