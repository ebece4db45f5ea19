"""Small groups for the tests of rewards."""

import numpy as np

from rl.types import Completions, Group, Prompts


def group(
    items, *, positives=(), history=(1, 2, 3), log_probs=None, serial=0, user=7, levels=2, **features
) -> Group:
    """Completions have different paths, unless they are the same item; positives have those of their items."""
    items = np.array(items, dtype=np.int64)
    paths = np.arange(len(items) * levels, dtype=np.int64).reshape(len(items), levels)
    path_of = {item: path for item, path in reversed([*zip(items.tolist(), paths, strict=True)]) if item >= 0}
    return Group(
        serial=serial,
        user_row=user,
        history=np.array(history, dtype=np.int64),
        positives=np.array(positives, dtype=np.int64),
        positive_paths=np.array(
            [path_of.get(item, np.full(levels, -1)) for item in positives], dtype=np.int64
        ).reshape(-1, levels),
        paths=np.array([path_of.get(item, path) for item, path in zip(items.tolist(), paths, strict=True)]),
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
            positive_paths=np.zeros((0, levels), dtype=np.int64),
        ),
        paths=np.zeros((*items.shape, levels), dtype=np.int64),
        items=items,
        log_probs=np.zeros((*items.shape, levels), dtype=np.float32),
        policy_version=1,
    )
