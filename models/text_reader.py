"""How users, items and candidates become what a text model reads. Host side.

    region of a user     [soft prompts] [BOS'] attributes | item [SEP] | item [SEP] | ...
    prompt of a query    [EOS']
    prompt of an item    [EOS'] | [BOS] candidate [EOS]
    region of an item    item [SEP]

Between the bars are segments, each of which the lower layers see alone.
"""

from dataclasses import dataclass

import numpy as np
import torch

from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged, gather_ranges
from models.remembered_states import RememberedStates
from models.text_reading import Reading, Segments
from models.texts import Texts

ITEM_END, REGION_BEGIN, REGION_END, TEXT_BEGIN, TEXT_END = range(5)
"""Marks, whose vectors stand behind those of the words: [SEP], [BOS'], [EOS'], [BOS] and [EOS]."""
NUM_MARKS = 5
BEHAVIOUR, CANDIDATE = "behaviour", "candidate"
"""Forms of an item's text that are remembered apart."""
BLANK = -1
"""Stands in a history for a behaviour whose text is left out."""


@dataclass(frozen=True, kw_only=True)
class TextReader:
    texts: Texts
    num_soft_prompts: int = 0
    is_bidirectional: bool = True
    """Whether a region is read both ways; else behaviours see no later one, and all prompts of a user share it."""
    only_last: bool = False
    """Whether of a behaviour or candidate its last token alone reaches the upper layers."""

    def retrieval(
        self,
        batch: SequenceBatch,
        visible: Jagged,
        items: np.ndarray,
        memory: RememberedStates | None = None,
    ) -> Reading:
        """A query for each prompt, which knows so many events of its user, and a region for each item.

        Texts whose states are remembered are not read again.

        Shapes: visible [P], a row per user; items [n], distinct and in order.
        """
        segments, known = Segments(memory), np.union1d(batch.items.values.numpy(), items)
        first_item = self._add_items(segments, known)
        users = self._add_users(segments, batch)
        alone = first_item + np.searchsorted(known, items)
        regions = _regions(batch, visible, known, users, first_item, is_shared=not self.is_bidirectional)
        closes = np.full(len(visible.values), users.close)
        return _put_together(segments, alone, regions, (closes, np.ones_like(closes)), users.close, self)

    def items(self, items: np.ndarray) -> Reading:
        """A region for each item, distinct and in order, and no users. Shapes: [n]."""
        nobody = torch.zeros(0, dtype=torch.int64)
        empty = Jagged.from_lengths(nobody, nobody)
        return self.retrieval(SequenceBatch(user_ids=nobody, items=empty), empty, items)

    def scoring(
        self,
        batch: SequenceBatch,
        visible: Jagged,
        candidates: np.ndarray,
        *,
        with_items: bool = False,
        memory: RememberedStates | None = None,
    ) -> Reading:
        """A prompt for each candidate, which knows so many events of its user.

        Behaviours may be left out (BLANK). `with_items`: a region for each of the distinct candidates, in order, as for
        `retrieval`.

        Shapes: visible [P], a row per user; candidates [P] item rows.
        """
        distinct, number = np.unique(candidates, return_inverse=True)
        items = distinct if with_items else distinct[:0]
        history = batch.items.values.numpy()
        segments, known = Segments(memory), np.union1d(history[history != BLANK], items)
        first_item = self._add_items(segments, known)
        alone = first_item + np.searchsorted(known, items)
        users = self._add_users(segments, batch)
        first_candidate = segments.add(
            self.texts.items,
            distinct,
            before=[self.mark(TEXT_BEGIN)],
            after=[self.mark(TEXT_END)],
            is_causal=True,
            only_last=self.only_last,
            remembered_as=CANDIDATE,
        )
        regions = _regions(batch, visible, known, users, first_item, is_shared=not self.is_bidirectional)
        # In the order of the prompts, which are grouped by region.
        shown = first_candidate + number[regions.slots]
        pairs = np.stack((np.full(len(shown), users.close), shown), axis=1)
        return _put_together(
            segments, alone, regions, (pairs.ravel(), np.full(len(shown), 2)), users.close, self
        )

    def mark(self, number: int) -> int:
        return self.texts.vocabulary_size + number

    def soft_prompts(self) -> list[int]:
        first = self.texts.vocabulary_size + NUM_MARKS
        return list(range(first, first + self.num_soft_prompts))

    def _add_items(self, segments: Segments, items: np.ndarray) -> int:
        after = [self.mark(ITEM_END)]
        return segments.add(
            self.texts.items, items, after=after, only_last=self.only_last, remembered_as=BEHAVIOUR
        )

    def _add_users(self, segments: Segments, batch: SequenceBatch) -> "_Users":
        before = [*self.soft_prompts(), self.mark(REGION_BEGIN)]
        profiles, numbers = self.texts.users, np.arange(batch.num_users)
        if profiles is None:
            # All users begin alike: one segment serves them all.
            first, numbers = segments.add(_NO_TEXT, np.zeros(1, dtype=np.int64), before=before), 0 * numbers
        else:
            first = segments.add(profiles, batch.user_ids.numpy(), before=before)
        close = self._add_mark(segments, REGION_END)
        has_blanks = bool((batch.items.values == BLANK).any())
        blank = self._add_mark(segments, TEXT_BEGIN) if has_blanks else close
        return _Users(segments=first + numbers, close=close, blank=blank)

    def _add_mark(self, segments: Segments, number: int) -> int:
        return segments.add(_NO_TEXT, np.zeros(1, dtype=np.int64), before=[self.mark(number)])


_NO_TEXT = Jagged.from_lengths(torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))


@dataclass(frozen=True, kw_only=True)
class _Users:
    segments: np.ndarray
    """[B] segment that each user's region begins with."""
    close: int
    """The segment of [EOS']."""
    blank: int
    """The segment that stands for a behaviour whose text is left out, a [BOS] alone; where there are any."""


@dataclass(frozen=True, kw_only=True)
class _Regions:
    """Shapes: R regions of X segments, P prompts."""

    segments: np.ndarray
    """[X]"""
    lengths: np.ndarray
    """[R] segments of each."""
    num_prompts: np.ndarray
    """[R]"""
    num_visible: np.ndarray
    """[P] segments each prompt sees, grouped by region."""
    slots: np.ndarray
    """[P] which of the prompts asked for stands there."""


def _regions(
    batch: SequenceBatch,
    visible: Jagged,
    known: np.ndarray,
    users: _Users,
    first_item: int,
    *,
    is_shared: bool,
) -> _Regions:
    """One region for all prompts of a user, or for those that know the same events.

    Shapes: visible [P] events, a row per user; known [K] items in order, whose segments begin at `first_item`.
    """
    user, events = visible.row_index().numpy(), visible.values.numpy()
    key = user if is_shared else user * (batch.items.max_length + 1) + events
    found, first, region = np.unique(key, return_index=True, return_inverse=True)
    longest = np.zeros(len(found), dtype=np.int64)
    np.maximum.at(longest, region, events)
    lengths, owner = longest + 1, user[first]
    segments = np.empty(int(lengths.sum()), dtype=np.int64)
    begins = np.cumsum(lengths) - lengths
    segments[begins] = users.segments[owner]
    history = batch.items.values.numpy()[gather_ranges(batch.items.offsets.numpy()[owner], longest)]
    taken = np.where(history == BLANK, users.blank, first_item + np.searchsorted(known, history))
    segments[gather_ranges(begins + 1, longest)] = taken
    slots = np.argsort(region, kind="stable")
    return _Regions(
        segments=segments,
        lengths=lengths,
        num_prompts=np.bincount(region, minlength=len(found)),
        num_visible=1 + events[slots],
        slots=slots,
    )


def _put_together(
    segments: Segments,
    alone: np.ndarray,
    regions: _Regions,
    prompts: tuple[np.ndarray, np.ndarray],
    close: int,
    reader: TextReader,
) -> Reading:
    """With a last region of [EOS'], so that there is always one."""
    return segments.reading(
        alone,
        (np.append(regions.segments, close), np.append(regions.lengths, 1)),
        prompts,
        num_prompts=np.append(regions.num_prompts, 0),
        num_visible=regions.num_visible,
        slots=regions.slots,
        is_bidirectional=reader.is_bidirectional,
    )
