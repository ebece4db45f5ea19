"""Histories with what is known of their users in front, and behind them prompts that say what is wanted. Host side.

    history of a user    words of the profile ... item item item ...
    prompt               objective ... query tokens

Profiles and objectives are symbols: words, or learnt tokens. Items are one token each.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged, gather_ranges
from models.answered_actions import EXPOSURE
from models.tables import Ids, Rows, carried, carried_back
from models.text_reading import framed
from models.texts import Texts

logger = logging.getLogger(__name__)

CLICK = "click"
PROFILES, ORDER, PROMPTS, VISIBLE = "profiles", "order", "prompts", "visible"


@dataclass(frozen=True, kw_only=True)
class PromptLayout:
    """Shapes: W symbols of profiles, N items, H = W + N tokens of B histories, G symbols of P prompts."""

    profiles: Tensor
    """[W] int64 symbols."""
    order: Jagged
    """[H] int64 in B rows, which of profiles and, behind them, items stands there."""
    prompts: Jagged
    """[G] int64 symbols, a row per prompt."""
    visible: Jagged
    """[P] int64 in B rows, how many tokens of its history each prompt sees."""

    def as_ids(self) -> Ids:
        """The same as features of a step's lookup."""
        jagged = {ORDER: self.order, PROMPTS: self.prompts, VISIBLE: self.visible}
        found = {PROFILES: self.profiles}
        for name, rows in jagged.items():
            found |= carried(name, rows)
        return found

    @staticmethod
    def of(rows: Rows) -> "PromptLayout":
        """The way back from `as_ids`, wherever the rows lie."""
        return PromptLayout(
            profiles=rows[PROFILES].ids,
            order=carried_back(ORDER, rows),
            prompts=carried_back(PROMPTS, rows),
            visible=carried_back(VISIBLE, rows),
        )


@dataclass(frozen=True, kw_only=True)
class Prompter:
    """Knows the symbols of every objective and user, and lays out the prompts of a batch."""

    num_queries: int
    """Query tokens at the end of each prompt, the first of the symbols."""
    num_learnt: int
    """Symbols that are learnt tokens; words come behind them."""
    objectives: Jagged
    """A row of symbols per objective."""
    profiles: Jagged | None = None
    """A row of symbols per user row; None where nothing is told of users."""

    def lay_out(self, batch: SequenceBatch, visible: Jagged, objectives: Tensor) -> PromptLayout:
        """Prompts that know so many of their user's events. Shapes: visible [P], a row per user; objectives [P]."""
        profiles, told = np.zeros(0, dtype=np.int64), np.zeros(batch.num_users, dtype=np.int64)
        if self.profiles is not None:
            profiles, told = framed(self.profiles, batch.user_ids.numpy(), (), ())
        events = batch.items.lengths.numpy()
        begins = np.cumsum(told + events) - (told + events)
        order = np.empty(len(profiles) + int(events.sum()), dtype=np.int64)
        order[gather_ranges(begins, told)] = np.arange(len(profiles))
        order[gather_ranges(begins + told, events)] = len(profiles) + np.arange(int(events.sum()))
        prompts, lengths = framed(self.objectives, objectives.numpy(), (), range(self.num_queries))
        in_front = torch.from_numpy(told)[visible.row_index()]
        return PromptLayout(
            profiles=torch.from_numpy(profiles),
            order=Jagged.from_lengths(torch.from_numpy(order), torch.from_numpy(told + events)),
            prompts=Jagged.from_lengths(torch.from_numpy(prompts), torch.from_numpy(lengths)),
            visible=visible.with_values(visible.values + in_front),
        )


@runtime_checkable
class Asking(Protocol):
    """What a model's Config says of its prompts."""

    num_queries: int
    by_action: bool
    reads_text: bool
    descriptions: tuple[str, ...]


def make_prompter(
    config: Asking, actions: Sequence[str], asked: str, texts: Texts | None
) -> tuple[Prompter, int]:
    """With an objective per action, in the order of their codes, or one of no symbols; and which one is asked for.

    Raises: ConfigError where no such action is known, or there is nothing to read.
    """
    number, num_learnt = _asked_objective(config, actions, asked), config.num_queries
    if not config.by_action:
        objectives = _rows([[]])
    elif texts is None:
        objectives = _rows([[num_learnt + code] for code in range(len(actions))])
        num_learnt += len(actions)
    else:
        said = _descriptions(config.descriptions, actions) + [asked] * (number == len(actions))
        objectives = _behind(texts.encode(said), num_learnt)
        logger.info("The model is asked for: %s.", said[number])
    if texts is not None and texts.users is None and not config.by_action:
        raise ConfigError(
            "model.reads-text needs something to read, and the data says nothing of users (--users of the source "
            "events); build it with that, or add --model.by-action, or leave the option out"
        )
    profiles = None if texts is None or texts.users is None else _behind(texts.users, num_learnt)
    prompter = Prompter(
        num_queries=config.num_queries, num_learnt=num_learnt, objectives=objectives, profiles=profiles
    )
    return prompter, number


def _asked_objective(config: Asking, actions: Sequence[str], asked: str) -> int:
    """The row of what is asked for: an action's code; left open, that of clicks, or of the first that is no exposure.

    What is no action, in words, comes behind all actions.
    """
    known = [name for name in actions if name != EXPOSURE] if config.by_action else []
    if config.by_action and not known:
        raise ConfigError(
            f"model.by-action needs data with actions, and the data has {', '.join(actions) or 'none'}; build it with "
            "--sequence-actions, or leave the option out"
        )
    if not asked:
        return actions.index(CLICK if CLICK in known else known[0]) if known else 0
    if asked in known:
        return actions.index(asked)
    if known and config.reads_text:
        return len(actions)
    raise ConfigError(
        f"evaluation.objective must be an action that a model with --model.by-action was trained for, of "
        f"{', '.join(known) or 'none'}; got {asked}. Trained with --model.reads-text too, it can be asked in words"
    )


def _descriptions(given: Sequence[str], actions: Sequence[str]) -> list[str]:
    """What is told of each action. Raises: ConfigError where one is of no action."""
    named = dict(text.partition("=")[::2] for text in given)
    unknown = [name for name, words in named.items() if name not in actions or not words]
    if unknown:
        raise ConfigError(
            f"model.descriptions must be ACTION=WORDS with an action of {', '.join(actions)}, got "
            f"{', '.join(given)}"
        )
    return [named.get(name, f"the next item to {name}") for name in actions]


def _rows(symbols: Sequence[Sequence[int]]) -> Jagged:
    values = torch.tensor([symbol for row in symbols for symbol in row], dtype=torch.int64)
    return Jagged.from_lengths(values, torch.tensor([len(row) for row in symbols]))


def _behind(words: Jagged, num_learnt: int) -> Jagged:
    return words.with_values(words.values.long() + num_learnt)
