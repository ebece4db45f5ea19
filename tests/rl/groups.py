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


def completions(items, *, levels: int = 2) -> Completions:
    """Of users with a history of one event and nothing observed. Shapes: items [B, G]."""
    items = np.array(items, dtype=np.int64)
    users, none = np.arange(len(items)), np.zeros(0, dtype=np.int64)
    return Completions(
        prompts=Prompts(
            serials=users,
            user_rows=users,
            history=users,
            history_offsets=np.arange(len(items) + 1),
            positives=none,
            positive_offsets=np.zeros(len(items) + 1, dtype=np.int64),
        ),
        paths=np.zeros((*items.shape, levels), dtype=np.int64),
        items=items,
        log_probs=np.zeros((*items.shape, levels), dtype=np.float32),
        policy_version=1,
    )
