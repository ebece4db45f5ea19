"""A model of how users answer what they are shown: attention of the shown item to the history, a head per action.

Source: Pi et al., Search-based Interest Model (SIM, 2020) and Zhou et al., Deep Interest Network (2018), of which the
dense reward of GenRec (JD.com, 2026) is said to be one. RECONSTRUCTED: one attention over the whole history of a few
hundred events, without SIM's search of a long one; several heads with a slope for recency in place of its time
features; softmax with a silent key (see the kernel). The auxiliary loss (what was taken next, after the idea of the
Deep Interest Evolution Network) ties items together that are taken after each other; without it the answers alone
taught little but the items' general appeal within three epochs of the synthetic world.

It learns from exposures: an exposed item is answered with an action if the same user did that on the same page. Only
what the user took on earlier pages is its history. The exposures that evaluate a model are not in its training data
(`data_streams.held_out_windows`).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_streams.batch import SequenceBatch, page_item_key, page_key
from data_streams.jagged import Jagged
from models.answered_actions import EXPOSURE, AnswersConfig, answered_actions
from models.kernels.interest_attention import interest_attention
from models.kernels.length_buckets import bucket_layout
from models.layers.dropout import Dropout
from models.layers.heads import checked_heads
from models.layers.linear import Linear
from models.next_taken import NextTaken
from models.recommender import LossSum, Ranker, StepContext
from models.tables import Ids, Rows, TableSpec

ITEM_TABLE = "item"
SHOWN, KEY_NUMBER, NUM_VISIBLE, ANSWER = "shown", "key_number", "num_visible", "answer_{}"


class RewardSim(Ranker):
    """A ranker that looks at each candidate by itself: what it attends to goes into a small network."""

    @dataclass(frozen=True, kw_only=True)
    class Config(AnswersConfig):
        width: int = 32
        """Size of item vectors."""
        num_heads: int = 4
        """Attention heads, each with its own memory of how long ago things were."""
        hidden: int = 64
        """Size of the layer before the heads of the actions."""
        dropout: float = 0.1
        """Dropout on the input of that layer."""
        auxiliary_weight: float = 1.0
        """Weight of the auxiliary loss: what was taken next, among items drawn at random."""
        num_negatives: int = 512
        """Items drawn per step for the auxiliary loss, the same for all users and workers."""
        init_scale: float = 0.05
        """Standard deviation of the initial item rows."""
        actions: tuple[str, ...] = ()
        """Answers it predicts, the first of which makes up the history; left out, all of the data but exposures,
        click first."""

        def build(self, **parts: Any) -> "RewardSim":
            return RewardSim(self, **parts)

    def __init__(self, config: Config, *, num_items: int, actions: tuple[str, ...], **_: Any):
        super().__init__()
        self.config, self.num_items, self.codes = config, num_items, tuple(actions)
        self.actions = answered_actions(config.actions, self.codes, "reward-sim")
        width = config.width
        checked_heads(config.num_heads, width)
        self.query = Linear(width, width, bias=False)
        self.key_value = Linear(width, 2 * width, bias=False)
        self.follow = NextTaken(width)
        self.recency = Recency(config.num_heads)
        self.dropout = Dropout(config.dropout)
        self.hidden = Linear(3 * width + config.num_heads, config.hidden)
        self.heads = Linear(config.hidden, len(self.actions))
        # Alike items attend to each other from the first step on; from random projections nothing personal is learned
        # for many epochs.
        for projection in (self.query.weight, *self.key_value.weight.chunk(2)):
            nn.init.eye_(projection)

    def tables(self) -> list[TableSpec]:
        return [
            TableSpec(
                name=ITEM_TABLE,
                num_rows=self.num_items,
                dim=self.config.width,
                features=("event", "candidate", *NextTaken.features),
                init_scale=self.config.init_scale,
                placement="row_wise",
            )
        ]

    def training_batch(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        """With the answers to every event, and which of the user's events it may attend to."""
        user = batch.items.row_index().numpy()
        action, page = (batch.features[name].numpy() for name in self.config.event_columns)
        offsets = batch.items.offsets.numpy()
        is_key = action == self.codes.index(self.actions[0])
        columns = _history_columns(is_key, _page_starts(user, page), user, offsets)
        same = page_item_key(user, page, batch.items.values.numpy())
        columns[SHOWN] = action == self.codes.index(EXPOSURE)
        for name in self.actions:
            columns[ANSWER.format(name)] = np.isin(same, same[action == self.codes.index(name)])
        return replace(batch, features={name: torch.from_numpy(values) for name, values in columns.items()})

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        items, keys = batch.items.values, torch.nonzero(batch.features[KEY_NUMBER] >= 0)[:, 0]
        per_user = torch.bincount(batch.items.row_index()[keys], minlength=batch.num_users)
        taken = Jagged.from_lengths(items[keys], per_user)
        parts = {"num_items": self.num_items, "num_negatives": self.config.num_negatives}
        return {"event": items, **NextTaken.ids(taken, context, **parts)}

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        features = batch.features
        logits = self._score(rows["event"].rows, batch.items, features[KEY_NUMBER], features[NUM_VISIBLE])
        answers = torch.stack([features[ANSWER.format(name)] for name in self.actions], dim=-1).float()
        losses = F.binary_cross_entropy_with_logits(logits, answers, reduction="none")
        losses = losses * features[SHOWN][:, None]
        # The divisor is that of every model, the events; those not shown only make the sum smaller.
        sums = dict(zip(self.actions, losses.detach().sum(0), strict=True))
        following = self.follow(rows)
        return LossSum(
            sum=losses.sum() + self.config.auxiliary_weight * following,
            count=batch.num_tokens,
            metrics={**sums, "auxiliary": following.detach()},
        )

    def candidate_ids(self, batch: SequenceBatch, candidates: Tensor) -> Ids:
        return {"event": batch.items.values, "candidate": candidates.clamp(min=0).flatten()}

    def logits(self, rows: Rows, batch: SequenceBatch, candidates: Tensor) -> Tensor:
        """The history holds what the user took and no exposures; candidates see all of it."""
        num_users, num_candidates = candidates.shape
        lengths, offsets = batch.items.lengths, batch.items.offsets
        user = torch.arange(num_users, device=offsets.device)
        # Each user's candidates stand behind the history, as if they were shown now.
        longer = Jagged(
            values=candidates.new_zeros(batch.num_tokens + candidates.numel()),
            offsets=offsets + num_candidates * torch.arange(num_users + 1, device=offsets.device),
            max_length=batch.items.max_length + num_candidates,
        )
        row = batch.items.row_index()
        number = torch.arange(batch.num_tokens, device=offsets.device) - offsets[row]
        history_at = longer.offsets[row] + number
        shown_at = (
            longer.offsets[1:, None] - num_candidates + torch.arange(num_candidates, device=offsets.device)
        )
        vectors = rows["event"].rows.new_zeros(longer.values.shape[0], self.config.width)
        vectors = vectors.index_copy(0, history_at, rows["event"].rows)
        vectors = vectors.index_copy(0, shown_at.flatten(), rows["candidate"].rows)
        key_number = torch.full_like(longer.values, -1).index_copy(0, history_at, number)
        visible = torch.zeros_like(longer.values).index_copy(
            0, shown_at.flatten(), lengths[user].repeat_interleave(num_candidates)
        )
        return self._score(vectors, longer, key_number, visible)[shown_at]

    def _score(self, items: Tensor, sequences: Jagged, key_numbers: Tensor, num_visible: Tensor) -> Tensor:
        """Log-odds of each action on every token. Shapes: items [T, D], numbers [T] -> [T, A] fp32."""
        split = (self.config.num_heads, -1)
        items = F.normalize(items.float(), dim=-1) * self.config.width**0.5
        keys, values = self.key_value(items).unflatten(-1, (2, *split)).unbind(1)
        queries = self.query(items).unflatten(-1, split)
        interest = interest_attention(
            queries,
            keys,
            values,
            key_numbers,
            num_visible,
            self.recency(),
            bucket_layout(sequences),
        )
        alike = (interest * items.unflatten(-1, split)).mean(-1)
        interest = interest.flatten(1)
        seen = torch.cat((items, interest, items * interest, alike), dim=-1)
        return self.heads(F.silu(self.hidden(self.dropout(seen)))).float()


class Recency(nn.Module):
    """How fast each head forgets, per item taken since; starts at 1/2, 1/8, 1/32, ..."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.log_slopes = nn.Parameter(-np.log(4.0) * torch.arange(num_heads) + np.log(0.5))

    def forward(self) -> Tensor:
        return self.log_slopes.exp()


def _page_starts(user: np.ndarray, page: np.ndarray) -> np.ndarray:
    """First event of each event's page, wherever its others are: pages may overlap. Shapes: [T] -> [T] int64."""
    _, first, number = np.unique(page_key(user, page), return_index=True, return_inverse=True)
    return first[number]


def _history_columns(
    is_key: np.ndarray, starts: np.ndarray, user: np.ndarray, offsets: np.ndarray
) -> dict[str, np.ndarray]:
    """Number of each key among those of its user, and how many lie before each event's page. Shapes: [T] each."""
    before = np.concatenate([[0], np.cumsum(is_key)])
    first = before[offsets[:-1]][user]
    return {
        KEY_NUMBER: np.where(is_key, before[:-1] - first, -1),
        NUM_VISIBLE: before[starts] - first,
    }
