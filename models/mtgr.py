"""MTGR: one pass of gated pointwise attention over a user scores all candidates of many requests at once.

Tokens of a user are the user itself, the static sequence (what was taken before the window), the real-time sequence
(what was taken in it) and the candidates, each kind a group with its own layer norm. A candidate sees the user, the
static sequence, the real-time events that are older than its own request, and itself; no other candidate.

Source: MTGR (Meituan, 2025), arXiv 2505.18654. Deviations: a token's weighted sum is divided by the number of tokens it
sees and not by that of all of the user's, so that no score depends on how many other candidates there are (the group
layer norm that follows takes either away, but for its epsilon); real-time events of one second see each other in the
order of the log alone; the auxiliary loss, which is off unless asked for; no features of time, place or profile, which
rankers are not given when they serve: a user is a hashed row.
RECONSTRUCTED: each projection is one layer with SiLU, as in HSTU; static and real-time tokens see no later real-time
event, and no candidate; a head of two layers per action; a bias by age in place of those of HSTU by position and time;
what the projections begin with; the item's vector is added to what is made of its features; the cross feature, how
often the user took the candidate before, is counted from the log; a window is the whole span, or begins with a random
request, and a history that is served is all real-time or all static accordingly.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from models.answered_actions import AnswersConfig, answered_actions
from models.exposure_windows import ANSWERS, CANDIDATES, Window, exposure_windows
from models.item_sequence import ITEM_TABLE
from models.kernels.prefix_attention import (
    NUM_AGE_BUCKETS,
    PrefixLayout,
    count_alike,
    own_attention,
    prefix_attention,
)
from models.layers.dropout import Dropout
from models.layers.group_layer_norm import GroupLayerNorm
from models.layers.heads import checked_heads
from models.layers.linear import Linear
from models.layers.pathways import Pathway, TokenOrder
from models.layers.user_context import USER_TABLE
from models.next_taken import NextTaken
from models.recommender import LossSum, Ranker, StepContext
from models.tables import UNBOUNDED, Ids, LookedUp, Rows, TableSpec

USER, STATIC, REAL_TIME, CANDIDATE = range(4)
"""Groups of tokens."""
NUM_GROUPS = 4
NO_ITEM = -2
"""Stands for the user's own token where items are compared; empty places of candidates are -1."""
MOST_COUNTED = 3
NEUTRAL_BUCKET = 3
"""Of ages: at first, later events are preferred, earlier ones avoided."""
CLOSED_GATES = 8
"""One gate in so many is closed at first."""


class MTGR(Ranker):
    """A ranker whose blocks work on all tokens of a user; the answers are read off the candidates."""

    @dataclass(frozen=True, kw_only=True)
    class Config(AnswersConfig):
        width: int = 32
        """Size of item vectors and of the residual stream."""
        num_blocks: int = 2
        """Blocks on top of each other."""
        num_heads: int = 2
        """Attention heads per block."""
        hidden: int = 64
        """Hidden layer between the features of a token and the token, and of the head of each action."""
        dropout: float = 0.1
        """Dropout on tokens and on what blocks add."""
        init_scale: float = 0.05
        """Standard deviation of the initial item rows."""
        window: Literal["span", "drawn"] = "span"
        """Whose exposures are candidates: span, of all requests, with all the user took as real-time sequence; drawn,
        of the requests from a random one on, before which the static sequence lies."""
        group_norm: bool = True
        """Norm each group of tokens with scales of its own; without, all share those of one."""
        dynamic_mask: bool = True
        """Hide real-time events from what was before them; without, a candidate sees the answer to itself. Only to
        measure what the mask is worth."""
        cross_features: bool = True
        """Tell a candidate how often the user took it before."""
        cross_width: int = 8
        """Size of the vectors of that count."""
        age_bias: bool = True
        """Add a learnt bias of each head by how many tokens ago an event was."""
        user_rows: int = 0
        """Rows of a hashed table of users, whose vector is a token; 0 is none."""
        auxiliary_weight: float = 0.0
        """Weight of an auxiliary loss the paper has not: what was taken next, among items drawn at random."""
        num_negatives: int = 512
        """Items drawn per step for the auxiliary loss, the same for all users and workers."""
        item_features: bool = False
        """Describe items by their feature vectors too (such as text embeddings)."""
        actions: tuple[str, ...] = ()
        """Answers it predicts, the first of which makes up the sequences; left out, all of the data but exposures,
        click first."""

        def __post_init__(self) -> None:
            positive = ("width", "num_blocks", "num_heads", "hidden", "cross_width", "num_negatives")
            wrong = [name for name in positive if getattr(self, name) < 1]
            wrong += [name for name in ("user_rows", "auxiliary_weight") if getattr(self, name) < 0]
            if wrong:
                given = ", ".join(f"{name.replace('_', '-')} {getattr(self, name)}" for name in wrong)
                raise ConfigError(
                    "sizes of mtgr must be at least 1, and user-rows and auxiliary-weight at least 0; got "
                    f"{given}"
                )

        event_columns = (*AnswersConfig.event_columns, "timestamp_s")

        def build(self, **parts: Any) -> "MTGR":
            return MTGR(self, **parts)

    def __init__(
        self,
        config: Config,
        *,
        num_items: int,
        actions: tuple[str, ...],
        item_feature_dim: int = 0,
        **_: Any,
    ):
        """`actions` are the names of the codes in the data's column `action`."""
        super().__init__()
        checked_heads(config.num_heads, config.width)
        self.config, self.num_items, self.codes = config, num_items, tuple(actions)
        self.uses_item_features = config.item_features
        self.actions = answered_actions(config.actions, self.codes, "mtgr")
        item_width = config.width * (1 + config.item_features)
        if config.item_features:
            self.feature_projection = Linear(item_feature_dim, config.width, bias=False)
        self.event_token = Pathway(item_width, config.hidden, config.width)
        cross_width = config.cross_width * config.cross_features
        self.candidate_token = Pathway(item_width + cross_width, config.hidden, config.width)
        if config.cross_features:
            self.times_taken = nn.Embedding(MOST_COUNTED + 1, config.cross_width)
        if config.user_rows:
            self.user_token = Pathway(config.width, config.hidden, config.width)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.heads = nn.ModuleList(Pathway(config.width, config.hidden, 1) for _ in self.actions)
        if config.auxiliary_weight:
            self.follow = NextTaken(config.width)

    def tables(self) -> list[TableSpec]:
        config = self.config
        parts = {"dim": config.width, "init_scale": config.init_scale, "placement": "row_wise"}
        features = ("event", "candidate", *NextTaken.features * bool(config.auxiliary_weight))
        items = TableSpec(name=ITEM_TABLE, num_rows=self.num_items, features=features, **parts)
        users = TableSpec(
            name=USER_TABLE,
            num_rows=UNBOUNDED,
            hash_rows=config.user_rows,
            features=("user",),
            rows_are_items=False,
            rows_are_users=True,
            **parts,
        )
        return [items] + [users] * bool(config.user_rows)

    def training_batch(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        """With the candidates of each user's window, and what is known to which."""
        return exposure_windows(
            batch,
            context,
            codes=self.codes,
            actions=self.actions,
            drawn=self.config.window == "drawn",
        )

    def num_targets(self, batch: SequenceBatch) -> int:
        return batch.supervision[CANDIDATES].values.shape[0]

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        config, found = self.config, self._ids(batch, batch.supervision[CANDIDATES].values)
        if not config.auxiliary_weight:
            return found
        parts = {"num_items": self.num_items, "num_negatives": config.num_negatives}
        return {**found, **NextTaken.ids(batch.items, context, **parts)}

    def candidate_ids(self, batch: SequenceBatch, candidates: Tensor) -> Ids:
        return self._ids(batch, candidates.clamp(min=0).flatten())

    def _ids(self, batch: SequenceBatch, candidates: Tensor) -> Ids:
        users = {"user": batch.user_ids} if self.config.user_rows else {}
        return {"event": batch.items.values, "candidate": candidates, **users}

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        logits = self._score(rows, Window.of_training(batch))
        answers = batch.supervision[ANSWERS].values.float()
        losses = F.binary_cross_entropy_with_logits(logits, answers, reduction="none")
        total, metrics = losses.sum(), dict(zip(self.actions, losses.detach().sum(0), strict=True))
        if self.config.auxiliary_weight:
            following = self.follow(rows)
            total = total + self.config.auxiliary_weight * following
            metrics["auxiliary"] = following.detach()
        return LossSum(sum=total, count=self.num_targets(batch), metrics=metrics)

    def logits(self, rows: Rows, batch: SequenceBatch, candidates: Tensor) -> Tensor:
        """The history holds what the user took; all candidates are of one request after it."""
        window = Window.of_request(batch, candidates, is_static=self.config.window == "drawn")
        return self._score(rows, window).unflatten(0, candidates.shape)

    def _score(self, rows: Rows, window: Window) -> Tensor:
        """Log-odds of each action on every candidate. Shapes: -> [K, A] fp32."""
        order = TokenOrder.build(window.context, with_user=bool(self.config.user_rows), num_pathways=1)
        plan = self._plan(window, order)
        candidates = self._candidate_tokens(rows, window, order, plan)
        hidden = self.dropout(torch.cat((self._context_tokens(rows, order), candidates)))
        for block in self.blocks:
            hidden = block(hidden, plan)
        answered = hidden[plan.num_context :]
        return torch.cat([head(answered) for head in self.heads], dim=-1).float()

    def _context_tokens(self, rows: Rows, order: TokenOrder) -> Tensor:
        """Shapes: [N, D], with the users [N + B, D]."""
        taken = self._describe(rows["event"])
        tokens = [taken[:, : self.config.width] + self.event_token(taken)]
        if self.config.user_rows:
            tokens.insert(0, self.user_token(rows["user"].rows * self.config.width**0.5))
        return order.arrange(tokens)

    def _candidate_tokens(self, rows: Rows, window: Window, order: TokenOrder, plan: "Plan") -> Tensor:
        """Shapes: [K, D]."""
        shown = features = self._describe(rows["candidate"])
        if self.config.cross_features:
            no_item = [torch.full_like(window.num_static, NO_ITEM)] * bool(self.config.user_rows)
            taken = order.arrange([*no_item, window.context.values])
            counts = count_alike(window.candidates.values, taken, plan.candidates)
            features = torch.cat((shown, self.times_taken(counts.clamp(max=MOST_COUNTED))), dim=-1)
        return shown[:, : self.config.width] + self.candidate_token(features)

    def _describe(self, found: LookedUp) -> Tensor:
        """Shapes: [n, features]."""
        scaled = found.rows * self.config.width**0.5
        if not self.config.item_features:
            return scaled
        return torch.cat((scaled, self.feature_projection(found.item_features.float())), dim=-1)

    def _plan(self, window: Window, order: TokenOrder) -> "Plan":
        """Which group each token is of, and what it sees: always the first so many of the user's context."""
        context, own = order.places, int(bool(self.config.user_rows))
        row, place = context.row_index(), context.places()
        num_static = window.num_static[row] + own
        is_static = place < num_static
        visible, shown = torch.where(is_static, num_static, place + 1), window.visible + own
        if not self.config.dynamic_mask:
            visible, shown = (context.lengths[of] for of in (row, window.candidates.row_index()))
        groups = torch.where(is_static, STATIC, REAL_TIME)
        groups = torch.where(place < own, USER, groups)
        groups = torch.cat((groups, torch.full_like(shown, CANDIDATE)))
        if not self.config.group_norm:
            groups = torch.zeros_like(groups)
        return Plan(
            num_context=len(row),
            membership=(groups[:, None] == torch.arange(NUM_GROUPS, device=groups.device)).float(),
            context=PrefixLayout.build(context.with_values(visible), context),
            candidates=PrefixLayout.build(window.candidates.with_values(shown), context),
            num_seen=torch.cat((visible, shown + 1)),
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all blocks share. Shapes: T tokens, the context of all users before the candidates of all."""

    num_context: int
    membership: Tensor
    """[T, groups] fp32, 1 in the column of the token's group."""
    context: PrefixLayout
    """What tokens of the context see of it."""
    candidates: PrefixLayout
    """What candidates see of it."""
    num_seen: Tensor
    """[T] int64, at least 1."""


class Block(nn.Module):
    """X + f(dropout(norm(V' * U))) with [Q, K, V, U] = SiLU(norm(X) W), V' = sum of SiLU(Q K^T + bias) V / seen."""

    def __init__(self, config: MTGR.Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.before = GroupLayerNorm(NUM_GROUPS, config.width)
        self.projection = Linear(config.width, 4 * config.width)
        self.bias = AgeBias(config.num_heads) if config.age_bias else None
        # At first tokens that are alike attend to each other, and keep what they have in common.
        for part in self.projection.weight.chunk(4):
            nn.init.eye_(part)
        # What the norm makes of a zero tells how large the mean is, which it takes away: how alike the tokens are.
        with torch.no_grad():
            self.projection.weight.chunk(4)[-1][::CLOSED_GATES] = 0
        nn.init.zeros_(self.projection.bias)
        self.after = GroupLayerNorm(NUM_GROUPS, config.width)
        self.output = Linear(config.width, config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, hidden: Tensor, plan: Plan) -> Tensor:
        """Shapes: hidden [T, D] -> [T, D]."""
        packed = F.silu(self.projection(self.before(hidden, plan.membership)))
        *heads, gate = packed.chunk(4, dim=-1)
        attended = self._attend(*(part.unflatten(-1, (self.num_heads, -1)) for part in heads), plan)
        gated = self.after(attended.flatten(1) * gate, plan.membership)
        return hidden + self.output(self.dropout(gated))

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, plan: Plan) -> Tensor:
        """Shapes: [T, heads, A] each -> [T, heads, A]."""
        cut = (plan.num_context, queries.shape[0] - plan.num_context)
        (cq, pq), (ck, pk), (cv, pv) = (part.split(cut) for part in (queries, keys, values))
        by_age = None if self.bias is None else self.bias()
        in_context = prefix_attention(cq, ck, cv, plan.context, by_age)
        before = prefix_attention(pq, ck, cv, plan.candidates, by_age)
        shown = before + own_attention(pq, pk, pv, by_age)
        return torch.cat((in_context, shown)) / plan.num_seen[:, None, None]


class AgeBias(nn.Module):
    """The biases of one layer by age; a module of its own, so that ZeRO-3 gathers them while it is called.

    At first every head looks at what is recent, each half as strongly as the one before it.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        slopes = 0.5 ** torch.arange(num_heads)
        self.by_age = nn.Parameter(slopes[:, None] * (NEUTRAL_BUCKET - torch.arange(NUM_AGE_BUCKETS)))

    def forward(self) -> Tensor:
        """Shapes: [heads, NUM_AGE_BUCKETS]."""
        return self.by_age.clone()
