"""What travels between the parts of alignment: prompts, completions, groups for the rewards, rewards, advantages.

All of them hold NumPy arrays on the host, so that any of them is cheap to ship to another process.

Shapes: B users (one prompt each), G completions of each, L codes of an item, T history events, P observed positives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

ILLEGAL = -1
"""Item of a path that no item of the catalogue has."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What completions are generated from, and what the user then really took."""

    serials: np.ndarray
    """[B] int64, place of each prompt in the order of the run; never reused, so that an audit can count them."""
    user_rows: np.ndarray
    """[B] int64."""
    history: np.ndarray
    """[T] int64 item rows of all users, each user's oldest first."""
    history_offsets: np.ndarray
    """[B + 1] int64."""
    positives: np.ndarray
    """[P] int64 item rows of what was observed after the history: the set D+ of GRPO-SR."""
    positive_offsets: np.ndarray
    """[B + 1] int64."""
    positive_paths: np.ndarray
    """[P, L] int64 codes of the positives."""
    history_features: Mapping[str, np.ndarray] = field(default_factory=dict)
    """[T] each: event columns of the history, such as play_time_s."""
    positive_features: Mapping[str, np.ndarray] = field(default_factory=dict)
    """[P] each: the same columns of the positives."""

    @property
    def num_users(self) -> int:
        return len(self.user_rows)


@dataclass(frozen=True, kw_only=True)
class Completions:
    """What a rollout worker brings back for some prompts."""

    prompts: Prompts
    paths: np.ndarray
    """[B, G, L] int64 codes."""
    items: np.ndarray
    """[B, G] int64 item rows, -1 for an illegal path."""
    log_probs: np.ndarray
    """[B, G, L] float32, of each code in the distribution it was drawn from, mask and temperature included."""
    policy_version: int
    """Version of the weights that generated them."""

    def __post_init__(self) -> None:
        expected = (self.prompts.num_users, *self.paths.shape[1:])
        if (
            self.paths.shape != expected
            or self.log_probs.shape != expected
            or self.items.shape != expected[:2]
        ):
            raise ValueError(
                f"completions of {self.prompts.num_users} users need paths and log_probs [B, G, L] and items "
                f"[B, G], got {self.paths.shape}, {self.log_probs.shape} and {self.items.shape}"
            )

    @property
    def legal(self) -> np.ndarray:
        """[B, G] bool."""
        return self.items != ILLEGAL

    def groups(self) -> list["Group"]:
        """One group per user, to be shipped to the rewards."""
        prompts, totals = self.prompts, self.log_probs.sum(-1)
        groups = []
        for user in range(prompts.num_users):
            past = slice(*prompts.history_offsets[user : user + 2])
            taken = slice(*prompts.positive_offsets[user : user + 2])
            groups.append(
                Group(
                    serial=int(prompts.serials[user]),
                    user_row=int(prompts.user_rows[user]),
                    history=prompts.history[past],
                    history_features={
                        name: column[past] for name, column in prompts.history_features.items()
                    },
                    positives=prompts.positives[taken],
                    positive_paths=prompts.positive_paths[taken],
                    positive_features={
                        name: column[taken] for name, column in prompts.positive_features.items()
                    },
                    paths=self.paths[user],
                    items=self.items[user],
                    log_probs=totals[user],
                )
            )
        return groups


def join_completions(parts: Sequence[Completions]) -> Completions:
    """The users of all parts, one part behind the other, with the version of the oldest policy among them."""
    version = min(part.policy_version for part in parts)
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("paths", "items", "log_probs")
    }
    return Completions(
        prompts=_join_prompts([part.prompts for part in parts]), policy_version=version, **arrays
    )


def _join_prompts(parts: Sequence[Prompts]) -> Prompts:
    def join(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    def join_offsets(name: str) -> np.ndarray:
        lengths = [np.diff(getattr(part, name)) for part in parts]
        return np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)

    def join_columns(name: str) -> dict[str, np.ndarray]:
        columns = [getattr(part, name) for part in parts]
        return {column: np.concatenate([entry[column] for entry in columns]) for column in columns[0]}

    return Prompts(
        **{name: join(name) for name in ("serials", "user_rows", "history", "positives", "positive_paths")},
        **{name: join_offsets(name) for name in ("history_offsets", "positive_offsets")},
        **{name: join_columns(name) for name in ("history_features", "positive_features")},
    )


@dataclass(frozen=True, kw_only=True)
class Group:
    """The completions of one user, as the rewards see them."""

    serial: int
    user_row: int
    history: np.ndarray
    """[T] int64 item rows, oldest first."""
    positives: np.ndarray
    """[P] int64 item rows observed after the history."""
    positive_paths: np.ndarray
    """[P, L] int64."""
    paths: np.ndarray
    """[G, L] int64."""
    items: np.ndarray
    """[G] int64, -1 for an illegal path."""
    log_probs: np.ndarray
    """[G] float32, of the whole paths; says how the generator ranks them."""
    history_features: Mapping[str, np.ndarray] = field(default_factory=dict)
    positive_features: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.items)

    @property
    def num_levels(self) -> int:
        return self.paths.shape[1]

    @property
    def legal(self) -> np.ndarray:
        """[G] bool."""
        return self.items != ILLEGAL

    @property
    def is_positive(self) -> np.ndarray:
        """Which completions have the path of an observed positive. Shapes: [G] bool.

        The generator writes paths: where several items share one, `items` holds any of them.
        """
        return (self.paths[:, None] == self.positive_paths).all(-1).any(1)


@dataclass(frozen=True, kw_only=True)
class Reward:
    """What one reward says of one group."""

    values: np.ndarray
    """[G] float32, or [G, L] for a reward of every prefix."""
    mask: np.ndarray
    """[G] bool: which completions it has an opinion of; of the others it says nothing: they are
    left out where no reward has an opinion, and worth what the other rewards say where those have one."""

    @staticmethod
    def of(values: np.ndarray, mask: np.ndarray | None = None) -> "Reward":
        """With an opinion of every completion, unless a mask says otherwise."""
        values = np.asarray(values, dtype=np.float32)
        return Reward(values=values, mask=np.ones(len(values), dtype=bool) if mask is None else mask)


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """How much better than expected each completion, or each of its codes, is."""

    values: np.ndarray
    """[B, G] or [B, G, L] float32; 0 where there is nothing to learn from."""
    mask: np.ndarray
    """[B, G] bool: completions that count, also where their group teaches nothing."""
    skipped: np.ndarray
    """[B] bool: groups without a difference to learn from."""

    @staticmethod
    def of_nobody(group_size: int) -> "Advantages":
        """Those of a step without users. Shapes: values, mask [0, G], skipped [0]."""
        return Advantages(
            values=np.zeros((0, group_size), dtype=np.float32),
            mask=np.zeros((0, group_size), dtype=bool),
            skipped=np.zeros(0, dtype=bool),
        )


def stack(rewards: Sequence[Reward]) -> tuple[np.ndarray, np.ndarray]:
    """Values [B, G] or [B, G, L] and masks [B, G] of the groups of a batch."""
    return np.stack([reward.values for reward in rewards]), np.stack([reward.mask for reward in rewards])
