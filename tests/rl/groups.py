"""Small groups for the tests of rewards."""

import numpy as np

from rl.types import Completions, Group, Prompts


def group(
    items, *, positives=(), history=(1, 2, 3), log_probs=None, serial=0, user=7, levels=2, **features
) -> Group:
    items = np.array(items, dtype=np.int64)
    return Group(
        serial=serial,
        user_row=user,
        history=np.array(history, dtype=np.int64),
        positives=np.array(positives, dtype=np.int64),
        paths=np.arange(len(items) * levels, dtype=np.int64).reshape(len(items), levels),
        items=items,
        log_probs=np.zeros(len(items), dtype=np.float32) if log_probs is None else np.array(log_probs),
        **features,
    )


def nobody(*, group_size: int, levels: int = 2) -> Completions:
    """The completions of a step without users."""
    none, offsets = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
    return Completions(
        prompts=Prompts(
            serials=none,
            user_rows=none,
            history=none,
            history_offsets=offsets,
            positives=none,
            positive_offsets=offsets,
        ),
        paths=np.zeros((0, group_size, levels), dtype=np.int64),
        items=np.zeros((0, group_size), dtype=np.int64),
        log_probs=np.zeros((0, group_size, levels), dtype=np.float32),
        policy_version=1,
    )
