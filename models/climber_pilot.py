"""Climber-Pilot: a transformer over the user's items whose branches learn several next items at once.

Pretraining (time-aware multi-item prediction, TAMIP): K branches, each one layer on top of the shared backbone, learn
the next item, the one after it, and so on. What happened within `time_window_s` before the first of them is hidden, as
it is when a request returns a whole page. Only the first branch serves.

Fine-tuning (condition-guided sparse attention, CGSA) with `condition_column`: the branches attend only to events whose
items meet a condition, such as a category. The backbone does not know the condition, so P of them share one pass.

Source: Climber-Pilot (2026), arXiv 2602.13581. RECONSTRUCTED: the state read for a target is that of the last event
older than its window, since the residual stream carries an event's item where attention hides it; where nothing of the
history meets the condition, the whole history is seen; the learned condition is a key and value of its own. Deviations:
blocks are SASRec's, with absolute positions beside the attention bias; the recipes train with sampled softmax over
cosines and uniform negatives, where the paper has inner products and in-batch negatives (`--objective in-batch-softmax
--objective.no-normalised --objective.temperature 1 --objective.no-log-q`); an item's vector has no category embedding
beside its row (`item_features` can add one from text); targets that nothing visible precedes are left out of the loss,
which is a mean over the targets of all branches, where the paper adds the losses of the branches up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.item_sequence import ItemSequenceModel
from models.kernels.length_buckets import BucketLayout, bucket_layout, to_cells
from models.kernels.masked_attention import (
    Extra,
    attend_last,
    masked_attention,
    matching_masks,
    prefix_masks,
    users_of_buckets,
)
from models.layers.initialise import initialise
from models.multi_item_targets import (
    NO_CONDITION,
    OFFERED,
    TIME,
    VISIBLE,
    WANTED,
    conditional_batch,
    multi_item_batch,
    slots_name,
    targets_name,
    with_item_conditions,
)
from models.recommender import LossSum, StepContext
from models.sasrec import Block, SASRec
from models.tables import Ids, Rows


class ClimberPilot(ItemSequenceModel):
    """A retriever by the state of its first branch; all branches add to the loss."""

    added_parameters = ("condition_tokens.",)

    @dataclass(frozen=True, kw_only=True)
    class Config(SASRec.Config):
        num_branches: int = 2
        """Items to be predicted at once, each by a branch of its own; 1 is next-item training."""
        time_window_s: float | None = 900.0
        """Seconds before a target in which events are hidden in training; None hides nothing."""
        mask_backbone: bool = True
        """Hide events in the backbone too, from each event those that are new before the next one, as the paper does.
        False hides them from the branches alone: no hidden event reaches them either, and the backbone is the same in
        training and serving."""
        position_bias: bool = True
        """Add a learnt bias by the number of events between two events to the attention."""
        condition_column: str = ""
        """Item column whose values are conditions (such as categories), for fine-tuning the branches on them."""
        condition_by: Literal["attention", "embedding"] = "attention"
        """attention narrows the branches to events that meet the condition; embedding, a baseline, only adds a learnt
        vector of the condition to the state."""
        condition_token: bool = True
        """With attention: let a learnt key and value of the condition always be seen."""

        @property
        def event_columns(self) -> tuple[str, ...]:
            """Event columns the model reads beside the items."""
            return () if self.time_window_s is None else (TIME,)

        def build(self, **parts: Any) -> "ClimberPilot":
            return ClimberPilot(self, **parts)

    def __init__(
        self,
        config: Config,
        *,
        condition_table: np.ndarray | None = None,
        condition_names: tuple[str, ...] = (),
        **parts: Any,
    ):
        """Shapes: condition_table [N, m], the conditions each item meets, -1 for none."""
        super().__init__(config, **parts)
        _check(config, condition_table)
        self.condition_table, self.condition_names = condition_table, condition_names
        self.blocks = nn.ModuleList(PilotBlock(config, self.max_length) for _ in range(config.num_blocks))
        self.branches = nn.ModuleList(Branch(config, self.max_length) for _ in range(config.num_branches))
        self.has_tokens = condition_table is not None and (
            config.condition_token or config.condition_by == "embedding"
        )
        if self.has_tokens:
            # The last one stands for no condition.
            self.condition_tokens = nn.Embedding(len(condition_names) + 1, config.width)
        self.apply(partial(initialise, scale=config.init_scale))

    def training_batch(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        if self.condition_table is not None:
            batch = conditional_batch(batch, context, self.condition_table)
        return multi_item_batch(
            batch,
            num_branches=self.config.num_branches,
            window_s=self.config.time_window_s,
            same_target=self.condition_table is not None,
        )

    def num_targets(self, batch: SequenceBatch) -> int:
        return sum(targets.values.shape[0] for targets in self._targets(batch))

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        targets = torch.cat([targets.values for targets in self._targets(batch)])
        return {**self.query_ids(batch), **self.objective.ids(targets, context)}

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        layout, visible = bucket_layout(batch.items), batch.features[VISIBLE]
        upto = batch.items.places() + 1
        in_backbone = visible if self.config.mask_backbone else upto
        hidden = self._backbone(self.embed_events(rows["history"], batch), layout, in_backbone)
        states = []
        for number, branch in enumerate(self.branches):
            slots = batch.supervision[slots_name(number)]
            back = number if self.condition_table is not None else 0
            seen = torch.minimum(visible, (upto - back).clamp(min=0))
            state = self._branch(branch, hidden, batch, layout, seen)
            states.append(state[batch.items.offsets[slots.row_index()] + slots.values])
        targets = torch.cat([targets.values for targets in self._targets(batch)])
        vectors = {name: self.item_vectors(rows[name]) for name in self.objective.features}
        ids = {name: rows[name].ids for name in self.objective.features}
        return self.objective(self.objective.queries(torch.cat(states)), targets, vectors, ids, context)

    def encode_events(self, hidden: Tensor, batch: SequenceBatch) -> Tensor:
        layout, visible = bucket_layout(batch.items), batch.items.places() + 1
        hidden = self._backbone(hidden, layout, visible)
        return self.branches[0](hidden, layout, prefix_masks(visible, layout))

    def with_conditions(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch with what `conditional_queries` reads beside the rows; host side."""
        return with_item_conditions(batch, self.condition_table)

    def conditional_queries(self, rows: Rows, batch: SequenceBatch, wanted: Tensor) -> Tensor:
        """The user under each of P conditions, below 0 for none. Shapes: wanted [B, P] -> [B, P, D] fp32.

        Cost: one pass of the backbone, and P queries of one layer for each user.
        """
        layout, visible = bucket_layout(batch.items), batch.items.places() + 1
        hidden = self._backbone(self.embed_events(rows["history"], batch), layout, visible)
        states = self.branches[0].answer(
            hidden,
            batch.items,
            layout,
            wanted=torch.where((wanted >= 0) & self._narrows, wanted, NO_CONDITION),
            offered=batch.features[OFFERED],
            tokens=self._tokens(wanted.flatten()),
            as_key=self._narrows,
        )
        return self.objective.queries(states.flatten(0, 1)).unflatten(0, wanted.shape)

    @property
    def _narrows(self) -> bool:
        return self.config.condition_by == "attention"

    def _targets(self, batch: SequenceBatch) -> list[Jagged]:
        return [batch.supervision[targets_name(number)] for number in range(self.config.num_branches)]

    def _backbone(self, hidden: Tensor, layout: BucketLayout, visible: Tensor) -> Tensor:
        masks = prefix_masks(visible, layout)
        for block in self.blocks:
            hidden = block(hidden, layout, masks)
        return hidden

    def _branch(
        self, branch: "Branch", hidden: Tensor, batch: SequenceBatch, layout: BucketLayout, visible: Tensor
    ) -> Tensor:
        """The state for the target after each event, read at the last visible one. Shapes: [T, D], [T] -> [T, D]."""
        masks = prefix_masks(visible, layout)
        tokens = None
        if self.condition_table is not None:
            wanted = batch.features[WANTED]
            tokens = self._tokens(wanted)
            if self._narrows:
                masks = matching_masks(masks, wanted, batch.features[OFFERED], layout)
        read = (visible - 1).clamp(min=0)
        return branch(
            hidden, layout, masks, read=read, sequences=batch.items, tokens=tokens, as_key=self._narrows
        )

    def _tokens(self, wanted: Tensor) -> Tensor | None:
        """The learnt vectors of conditions. Shapes: [N] -> [N, D]."""
        if not self.has_tokens:
            return None
        return self.condition_tokens(torch.where(wanted < 0, len(self.condition_names), wanted))


class PilotBlock(Block):
    """SASRec's block with a mask and a bias by distance in its attention."""

    def __init__(self, config: ClimberPilot.Config, max_length: int):
        super().__init__(config)
        self.distances = nn.Embedding(max_length, config.num_heads) if config.position_bias else None

    def forward(self, hidden: Tensor, layout: BucketLayout, masks: Sequence[Tensor]) -> Tensor:
        """Shapes: hidden [T, D] -> [T, D]."""
        hidden, weights = self.with_bias_weights(hidden)
        queries, keys, values = self.project(self.attention_norm(hidden))
        attended = masked_attention(queries, keys, values, masks, layout, bias=shared_bias(weights, layout))
        return self.finish(hidden, attended)

    def with_bias_weights(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The states, and the bias by distance [max_length, heads].

        Looked up once per call, since ZeRO-3 gathers weights at each; without events, where no bias is read, it is tied
        to the states, since ranks must have gradients of the same weights.
        """
        if self.distances is None:
            return hidden, None
        weights = self.distances(torch.arange(self.distances.num_embeddings, device=hidden.device)).float()
        return (hidden if hidden.shape[0] else hidden + 0 * weights.sum()), weights

    def project(self, normalised: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values. Shapes: [n, D] -> [n, heads, D / heads] each."""
        return self.query_key_value(normalised).unflatten(-1, (3, self.num_heads, -1)).unbind(1)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Shapes: hidden [n, D], attended [n, heads, D / heads] -> [n, D]."""
        return self.feed_forward(hidden + self.dropout(self.attention_output(attended.flatten(1))))


class Branch(PilotBlock):
    """A block whose queries may come from earlier events, with a norm behind it."""

    def __init__(self, config: ClimberPilot.Config, max_length: int):
        super().__init__(config, max_length)
        self.final_norm = nn.LayerNorm(config.width)

    def forward(
        self,
        hidden: Tensor,
        layout: BucketLayout,
        masks: Sequence[Tensor],
        *,
        read: Tensor | None = None,
        sequences: Jagged | None = None,
        tokens: Tensor | None = None,
        as_key: bool = True,
    ) -> Tensor:
        """Each event asks as the event at the place `read` of its user does.

        Shapes: hidden [T, D], read [T], tokens [T, D] -> [T, D].
        """
        hidden, weights = self.with_bias_weights(hidden)
        queries, keys, values = self.project(self.attention_norm(hidden))
        bias = shared_bias(weights, layout) if read is None else read_bias(weights, read, layout)
        if read is not None:
            rows = sequences.offsets[sequences.row_index()] + read
            queries, hidden = queries[rows], hidden[rows]
        hidden, extra = self._with_tokens(hidden, tokens, as_key)
        attended = masked_attention(queries, keys, values, masks, layout, bias=bias, extra=extra)
        return self.final_norm(self.finish(hidden, attended))

    def answer(
        self,
        hidden: Tensor,
        sequences: Jagged,
        layout: BucketLayout,
        *,
        wanted: Tensor,
        offered: Tensor,
        tokens: Tensor | None,
        as_key: bool,
    ) -> Tensor:
        """The last event of each user asks under P conditions. Shapes: hidden [T, D], wanted [B, P] -> [B, P, D]."""
        num_users, num_wanted = wanted.shape
        last = (sequences.offsets[1:] - 1).repeat_interleave(num_wanted)
        hidden, weights = self.with_bias_weights(hidden)
        queries, keys, values = self.project(self.attention_norm(hidden))
        bias = last_bias(weights, sequences, layout)
        own, extra = self._with_tokens(hidden[last], tokens, as_key)
        attended = attend_last(
            queries[last].unflatten(0, (num_users, num_wanted)),
            keys,
            values,
            sequences,
            layout,
            wanted=wanted,
            offered=offered,
            bias=bias,
            extra=extra,
        )
        return self.final_norm(self.finish(own, attended.flatten(0, 1))).unflatten(0, wanted.shape)

    def _with_tokens(
        self, hidden: Tensor, tokens: Tensor | None, as_key: bool
    ) -> tuple[Tensor, Extra | None]:
        """Conditions either stand beside the keys or are added to the states. Shapes: [n, D] each."""
        if tokens is None:
            return hidden, None
        if not as_key:
            return hidden + tokens, None
        _, keys, values = self.project(self.attention_norm(tokens))
        return hidden, Extra(keys=keys, values=values)


def shared_bias(weights: Tensor | None, layout: BucketLayout) -> list[Tensor] | None:
    """Bias where each event asks for itself. Shapes: weights [N, heads] -> [heads, length, length] per bucket."""
    if weights is None:
        return None
    longest = max((length for _, length in layout.buckets), default=1)
    bias = _bias_of(weights, torch.arange(longest, device=weights.device), longest)
    return [bias[:, :length, :length] for _, length in layout.buckets]


def read_bias(weights: Tensor | None, read: Tensor, layout: BucketLayout) -> list[Tensor] | None:
    """Bias where each event asks as the one at the place `read` of its user.

    Shapes: weights [N, heads], read [T] -> [users, heads, length, length] per bucket.
    """
    if weights is None:
        return None
    return [
        _bias_of(weights, cells[:, :, 0], cells.shape[1]).transpose(0, 1)
        for cells in to_cells(read[:, None], layout)
    ]


def last_bias(weights: Tensor | None, sequences: Jagged, layout: BucketLayout) -> list[Tensor] | None:
    """Bias where only the last event of each user asks. Shapes: weights [N, heads] -> [users, heads, 1, length]."""
    if weights is None:
        return None
    users = users_of_buckets(sequences, layout)
    return [
        _bias_of(weights, (sequences.lengths[who] - 1)[:, None], length).transpose(0, 1)
        for who, (_, length) in zip(users, layout.buckets, strict=True)
    ]


def _bias_of(weights: Tensor, places: Tensor, length: int) -> Tensor:
    """Shapes: places [..., Q] -> [heads, ..., Q, length]."""
    distance = places[..., None] - torch.arange(length, device=places.device)
    return F.embedding(distance.clamp(min=0, max=weights.shape[0] - 1), weights).movedim(-1, 0)


def _check(config: ClimberPilot.Config, condition_table: np.ndarray | None) -> None:
    if config.num_branches < 1:
        raise ConfigError(f"model.num-branches must be at least 1, got {config.num_branches}")
    if config.time_window_s is not None and config.time_window_s < 0:
        raise ConfigError(f"model.time-window-s must be at least 0, or None, got {config.time_window_s}")
    if not config.condition_column and (config.condition_by != "attention" or not config.condition_token):
        raise ConfigError(
            "model.condition-by and model.condition-token say how conditions are learnt, and there are none without "
            "model.condition-column; name a column of the items, or leave them out"
        )
    if config.condition_column and condition_table is None:
        raise ConfigError(
            f"model.condition-column {config.condition_column} needs the conditions of all items; build the model from "
            "a data set with that item column"
        )
