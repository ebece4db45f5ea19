"""What a text model reads in one step: distinct segments, put together to regions and to prompts behind them.

A segment is an item as behaviour, a user's attributes, or a candidate. All of it is laid out on the host ahead of the
step, so that the device only gathers: a reading travels as ids that no table has.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_streams.jagged import Jagged, gather_ranges
from models.remembered_states import UNKNOWN, RememberedStates
from models.tables import Ids, Rows, carried, carried_back

SPOKEN = "spoken"
"""Name under which what `Reading.words` finds travels with a reading."""
JAGGED = ("segments", "alone", "regions", "prompts", "visible")
PLAIN = ("segment_limits", "region_limits", "slots", "new", "remembered_from")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Shapes: N tokens in S segments, A tokens of those alone, H tokens in R regions, G in P prompts; R at least 1."""

    segments: Jagged
    """[N] int64 tokens, a row per segment, each once."""
    segment_limits: Tensor
    """[N] int64, how many tokens of its segment each sees."""
    alone: Jagged
    """[A] int64, which of the N stands there: segments that are a region each, without prompts. Apart from the others,
    which are many times as long: an accelerator lays all rows out as the longest one."""
    regions: Jagged
    """[H] int64, which of the N stands there."""
    region_limits: Tensor
    """[H] int64, how many tokens of its region each sees."""
    prompts: Jagged
    """[G] int64, which of the N stands there; grouped by region."""
    visible: Jagged
    """[P] int64 in R rows, how many tokens of its region each prompt sees."""
    slots: Tensor
    """[P] int64, where what comes of each prompt belongs, in the order it was asked for."""
    new: Tensor
    """[K] int64, which of the N are to be remembered."""
    remembered_from: Tensor
    """[1] int64, how many states are remembered already; [0] where none are. What stands nowhere among the N is one of
    those, behind them in number."""

    def joint_source(self) -> Tensor:
        """Which of the N tokens, and of the remembered ones behind them, the joint layers see. Shapes: [A + H + G]."""
        return torch.cat((self.alone.values, self.regions.values, self.prompts.values))

    def narrowed(self, kept: Tensor) -> tuple["Reading", Tensor]:
        """Some of the prompts alone, and which of the tokens of the joint layers are still there. Waits for the device.

        Regions that no prompt is left of go too, but for the last one. Shapes: kept [P] bool, in the order of the slots
        -> [A + H' + G'].
        """
        prompts, regions, visible = self.prompts, self.regions, self.visible
        stays = kept[self.slots]
        left = torch.zeros_like(visible.lengths).index_add(0, visible.row_index(), stays.long())
        asked = left > 0
        asked[-1] = True
        tokens = torch.cat(
            (
                torch.ones_like(self.alone.values, dtype=torch.bool),
                asked[regions.row_index()],
                stays[prompts.row_index()],
            )
        )
        number = kept.cumsum(0) - 1
        return Reading(
            segments=self.segments,
            segment_limits=self.segment_limits,
            alone=self.alone,
            regions=_rows_of(regions, asked),
            region_limits=self.region_limits[asked[regions.row_index()]],
            prompts=_rows_of(prompts, stays),
            visible=Jagged.on_device(visible.values[stays], left[asked], visible.max_length),
            slots=number[self.slots[stays]],
            new=self.new,
            remembered_from=self.remembered_from,
        ), torch.nonzero(tokens)[:, 0]

    def as_ids(self) -> Ids:
        """The same as features of a step's lookup."""
        found = {name: getattr(self, name) for name in PLAIN}
        for name in JAGGED:
            found |= carried(name, getattr(self, name))
        return found

    def words(self, vocabulary_size: int, kept: Tensor | None = None) -> Tensor:
        """Where among the tokens of the prompts a word comes next, in all of them or those that are kept. Host side.

        Shapes: kept [P] bool -> [M].
        """
        # Every prompt begins with a mark, so what comes before a word is of the same one.
        follows = self.segments.values[self.prompts.values][1:] < vocabulary_size
        if kept is not None:
            follows &= kept[self.prompts.row_index()[1:]]
        return torch.nonzero(follows)[:, 0]

    @staticmethod
    def of(rows: Rows) -> "Reading":
        """The way back from `as_ids`, wherever the rows lie."""
        jagged = {name: carried_back(name, rows) for name in JAGGED}
        return Reading(**jagged, **{name: rows[name].ids for name in PLAIN})


class Segments:
    """Segments in the making; each kind of them is added once."""

    def __init__(self, memory: RememberedStates | None = None) -> None:
        self.memory = memory
        self.remembered_from = [] if memory is None else [memory.begin()]
        self.tokens: list[np.ndarray] = []
        self.lengths: list[np.ndarray] = []
        """Tokens that are read, none of what is remembered."""
        self.is_causal: list[np.ndarray] = []
        self.only_last: list[np.ndarray] = []
        self.places: list[np.ndarray] = []
        """Where the remembered states of a segment begin, or UNKNOWN."""
        self.kept: list[np.ndarray] = []
        """Tokens that regions and prompts get of it."""
        self.is_new: list[np.ndarray] = []
        """Whether its states are to be remembered."""
        self.count = 0

    def add(
        self,
        texts: Jagged,
        wanted: np.ndarray,
        *,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
        is_causal: bool = False,
        only_last: bool = False,
        remembered_as: str = "",
    ) -> int:
        """A segment for each wanted row of the texts, between marks -> the number of the first one.

        `only_last`: of such a segment the last token alone is put into regions and prompts. Segments that are
        `remembered_as` something, whose rows are distinct, are not read again where their states are there already.
        """
        places, kept = np.full(len(wanted), UNKNOWN), np.zeros(len(wanted), dtype=np.int64)
        is_remembered = bool(remembered_as) and self.memory is not None
        if is_remembered:
            places, kept = self.memory.find(remembered_as, wanted, texts.num_rows)
        read = places == UNKNOWN
        tokens, own = framed(texts, wanted[read], before, after)
        lengths = np.zeros(len(wanted), dtype=np.int64)
        lengths[read] = own
        kept[read] = 1 if only_last else own
        if is_remembered:
            self.memory.give(remembered_as, wanted[read], kept[read])
        self.tokens.append(tokens)
        self.lengths.append(lengths)
        self.places.append(places)
        self.kept.append(kept)
        self.is_causal.append(np.full(len(wanted), is_causal))
        self.only_last.append(np.full(len(wanted), only_last))
        self.is_new.append(read & is_remembered)
        first, self.count = self.count, self.count + len(wanted)
        return first

    def reading(
        self,
        alone: np.ndarray,
        regions: tuple[np.ndarray, np.ndarray],
        prompts: tuple[np.ndarray, np.ndarray],
        *,
        num_prompts: np.ndarray,
        num_visible: np.ndarray,
        slots: np.ndarray,
        is_bidirectional: bool,
    ) -> Reading:
        """Regions and prompts as lists of segments.

        Shapes: alone [n] numbers of segments; regions and prompts are numbers of segments and how many each has ([X],
        [R]) and ([Y], [P]); num_prompts [R]; num_visible [P] segments, at least 1. Without `is_bidirectional`, segments
        of a region see no later one.
        """
        lengths, kept, is_causal, last, places, is_new = (
            np.concatenate(part)
            for part in (self.lengths, self.kept, self.is_causal, self.only_last, self.places, self.is_new)
        )
        starts = np.cumsum(lengths) - lengths
        kept_starts = np.where(last, starts + lengths - 1, starts)
        kept_starts = np.where(places == UNKNOWN, kept_starts, lengths.sum() + places)
        (region_segments, per_region), (prompt_segments, per_prompt) = regions, prompts
        ends, totals = sums_within(kept[region_segments], per_region)
        _, prompt_totals = sums_within(kept[prompt_segments], per_prompt)
        limits = np.repeat(totals, per_region) if is_bidirectional else ends
        first_segment = np.cumsum(per_region) - per_region
        seen = ends[np.repeat(first_segment, num_prompts) + num_visible - 1]
        within = np.arange(lengths.sum()) - np.repeat(starts, lengths)
        sees = np.where(np.repeat(is_causal, lengths), within + 1, np.repeat(lengths, lengths))
        return Reading(
            segments=_jagged(np.concatenate(self.tokens), lengths[places == UNKNOWN]),
            segment_limits=torch.from_numpy(sees),
            alone=_jagged(gather_ranges(kept_starts[alone], kept[alone]), kept[alone]),
            regions=_jagged(gather_ranges(kept_starts[region_segments], kept[region_segments]), totals),
            region_limits=torch.from_numpy(np.repeat(limits, kept[region_segments])),
            prompts=_jagged(
                gather_ranges(kept_starts[prompt_segments], kept[prompt_segments]), prompt_totals
            ),
            visible=_jagged(seen, num_prompts),
            slots=torch.from_numpy(slots),
            new=torch.from_numpy(gather_ranges(kept_starts[is_new], kept[is_new])),
            remembered_from=torch.tensor(self.remembered_from, dtype=torch.int64),
        )


def framed(
    texts: Jagged, wanted: np.ndarray, before: Sequence[int], after: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens between marks, one behind the other, and their lengths.

    Example: rows (3, 5) and () between (8,) and (9, 9) are 8 3 5 9 9 8 9 9, of lengths 5 and 3.
    """
    offsets = texts.offsets.numpy()
    starts, own = offsets[wanted], np.diff(offsets)[wanted]
    lengths = own + len(before) + len(after)
    tokens = np.empty(int(lengths.sum()), dtype=np.int64)
    at = np.cumsum(lengths) - lengths
    for place, mark in enumerate(before):
        tokens[at + place] = mark
    tokens[gather_ranges(at + len(before), own)] = texts.values.numpy()[gather_ranges(starts, own)]
    for place, mark in enumerate(after):
        tokens[at + len(before) + own + place] = mark
    return tokens, lengths


def sums_within(values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running sums within each row, and the whole sum of each. Shapes: [X] in rows of lengths [R] -> [X], [R].

    Example: rows (2, 3), () and (4) -> 2 5 4 and 5 0 4.
    """
    running = np.concatenate(([0], np.cumsum(values)))
    stops = np.cumsum(lengths)
    before = running[stops - lengths]
    return running[1:] - np.repeat(before, lengths), running[stops] - before


def _rows_of(rows: Jagged, kept: Tensor) -> Jagged:
    """Shapes: kept [B] bool."""
    return Jagged.on_device(rows.values[kept[rows.row_index()]], rows.lengths[kept], rows.max_length)


def _jagged(values: np.ndarray, lengths: np.ndarray) -> Jagged:
    return Jagged.from_lengths(torch.from_numpy(values), torch.from_numpy(lengths))
