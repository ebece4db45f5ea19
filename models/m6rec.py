"""M6-Rec as retriever: users and items are text alone, read by one language model, and meet as inner products.

A user is a region of attributes and of what was taken, read both ways, behind which a mark asks for the query; an item
is the same text it is as a behaviour, alone. No item has a row of a table, so one that nobody has ever taken is found
by its words.

Source: M6-Rec (Alibaba, 2022), arXiv 2205.08084; `models.text_encoder` tells of the language model. MEMORY: retrieval
by two texts encoded separately and a softmax over the items of the batch. RECONSTRUCTED: an item's vector is the state
at the mark behind its text. Deviations: [EOS'] sees the region and is not seen by it; a query may be learnt at every
position (`positions`), for which `region behaviours` reads forward from behaviour to behaviour; only item texts are in
the history, without times and places.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_streams.batch import SequenceBatch
from models.drawn_positions import PLACES, check_positions, draw_positions, drawn_events, whole_histories
from models.objectives.retrieval import RetrievalObjective
from models.recommender import LossSum, Retriever, StepContext
from models.tables import Ids, LookedUp, Rows, TableSpec
from models.text_encoder import TextEncoder, TextEncoderConfig, log_trained_share
from models.text_reading import Reading
from models.texts import Texts

ITEM, KNOWN = "item", "known items"
ITEMS_AT_A_TIME = 2048
"""Items whose texts are encoded together when serving."""


class M6Rec(Retriever):
    @dataclass(frozen=True, kw_only=True)
    class Config(TextEncoderConfig):
        positions: int | None = None
        """Positions drawn per user and step that a query is learnt at; None takes all. Each costs a copy of the history
        where it is read both ways."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_positions(self.positions)

        def build(self, **parts: Any) -> "M6Rec":
            return M6Rec(self, **parts)

    def __init__(self, config: TextEncoderConfig, *, objective: RetrievalObjective, texts: Texts, **_: Any):
        super().__init__()
        self.config, self.objective, self.texts = config, objective, texts
        self.encoder = TextEncoder(config, texts)
        self.added_parameters = self.encoder.added_parameters("encoder.")
        log_trained_share(self, self.encoder)

    def tables(self) -> list[TableSpec]:
        return []

    def training_batch(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        return draw_positions(batch, context, self.config.positions)

    def num_targets(self, batch: SequenceBatch) -> int:
        return batch.supervision[PLACES].values.shape[0]

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        places = batch.supervision[PLACES]
        wanted = self.objective.ids(batch.targets[drawn_events(batch)], context)
        # Items that are wanted several times are read once.
        known = np.unique(np.concatenate([ids.numpy() for ids in wanted.values()]))
        visible = places.with_values(places.values + 1)
        reading = self.encoder.reader.retrieval(batch, visible, known)
        return {**wanted, KNOWN: torch.from_numpy(known), **reading.as_ids()}

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        states = self.encoder(Reading.of(rows))
        known = rows[KNOWN].ids
        items = self.objective.candidates(states.alone)
        ids = {name: rows[name].ids for name in self.objective.features}
        vectors = {
            name: items.index_select(0, torch.searchsorted(known, wanted)) for name, wanted in ids.items()
        }
        queries = self.objective.queries(states.prompts)
        return self.objective(queries, batch.targets[drawn_events(batch)], vectors, ids, context)

    def query_ids(self, batch: SequenceBatch) -> Ids:
        nothing = np.zeros(0, dtype=np.int64)
        return self.encoder.reader.retrieval(
            batch, whole_histories(batch), nothing, self.encoder.memory
        ).as_ids()

    def query(self, rows: Rows, batch: SequenceBatch) -> Tensor:
        return self.objective.queries(self.encoder(Reading.of(rows)).prompts)

    def item_ids(self, items: Tensor) -> Ids:
        return {ITEM: items}

    def item_vectors(self, rows: LookedUp) -> Tensor:
        """Waits for the device: the texts lie on the host. Outside of training steps, which never call it."""
        known, number = rows.ids.cpu().unique(return_inverse=True)
        states = torch.cat([self._item_states(part, rows) for part in known.split(ITEMS_AT_A_TIME)])
        return self.objective.candidates(states).index_select(0, number.to(states.device))

    def _item_states(self, items: Tensor, rows: LookedUp) -> Tensor:
        """Shapes: items [n] on the host, distinct and in order -> [n, D]."""
        reading, device = self.encoder.reader.items(items.numpy()).as_ids(), rows.ids.device
        found = {name: LookedUp(ids=ids.to(device), rows=rows.rows[:0]) for name, ids in reading.items()}
        return self.encoder(Reading.of(found)).alone
