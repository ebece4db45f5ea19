"""Pretraining of M6-Rec's language model by infilling: the words of a behaviour that is left out of a history.

A blank stands where the behaviour was. The region around it is read as that of a ranker is, and the words are predicted
one after the other behind it. As a retriever it is what `models.m6rec` is, with weights that were never taught to be
one; another run starts from them by --init-from.

Source: M6-Rec (Alibaba, 2022), arXiv 2205.08084: infilling with a region that is read both ways, and one that is read
forward. RECONSTRUCTED: what is left out is the whole text of one behaviour, drawn anew for each user and step; the
blank is a [BOS] alone; the loss of a behaviour is the mean over its words.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from models.drawn_positions import draw_positions, drawn_events, whole_histories
from models.m6rec import M6Rec
from models.recommender import LossSum, StepContext
from models.tables import Ids, Rows
from models.text_encoder import TextEncoderConfig
from models.text_reader import BLANK
from models.text_reading import SPOKEN, Reading


class M6RecInfilling(M6Rec):
    @dataclass(frozen=True, kw_only=True)
    class Config(TextEncoderConfig):
        selection_metrics = ("step",)
        """What validation finds rises and falls with other things than what is learnt, so the last step is the best."""

        joint_tokens: Literal["all", "last"] = "all"
        """What of behaviours the upper layers see; words are predicted one after the other, which needs all."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.joint_tokens != "all":
                raise ConfigError(
                    f"infilling predicts word after word and needs --model.joint-tokens all, got {self.joint_tokens}"
                )

        def build(self, **parts: Any) -> "M6RecInfilling":
            return M6RecInfilling(self, **parts)

    def __init__(self, config: Config, **parts: Any):
        """Raises: ConfigError where the language model cannot predict words."""
        super().__init__(config, **parts)
        self.encoder.require_tied("leave infilling out")

    def training_batch(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        return draw_positions(batch, context, 1)

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        left_out = drawn_events(batch)
        blanks = batch.items.values.clone()
        blanks[left_out] = BLANK
        around = replace(batch, items=batch.items.with_values(blanks))
        wanted = batch.items.values[left_out].numpy()
        reading = self.encoder.reader.scoring(around, whole_histories(batch), wanted.astype(np.int64))
        return {**reading.as_ids(), SPOKEN: reading.words(self.texts.vocabulary_size)}

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        reading = Reading.of(rows)
        likelihoods = self.encoder.log_likelihoods(self.encoder(reading), reading, rows[SPOKEN].ids)
        return LossSum(sum=-likelihoods.sum(), count=self.num_targets(batch), metrics={})
