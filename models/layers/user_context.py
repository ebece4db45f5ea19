"""From a user's events to the tokens of a context: features, pathways, and from when on each is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.item_sequence import ITEM_TABLE
from models.kernels.context_attention import NEVER
from models.layers.code_embedding import CodeEmbedding
from models.layers.dropout import Dropout
from models.layers.event_features import ACTION, DURATION, PLAY_TIME, EventFeatures
from models.layers.linear import Linear
from models.layers.pathways import (
    ContextTokens,
    Pathway,
    TokenOrder,
    latest,
    positive_feedback,
)
from models.semantic_ids import SemanticIds
from models.tables import UNBOUNDED, Ids, LookedUp, Rows, TableSpec

USER_TABLE = "user"
USER, HISTORY, SHORT, POSITIVE = "user", "history", "short", "positive"
Span = tuple[Tensor, Tensor]
"""Since and until of tokens, as in `ContextTokens`."""


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """What describes events and items, and which pathways a context has."""

    hidden: int = 384
    """Hidden layer between the features of an event and its token."""
    item_rows: bool = True
    """Give every item a trained row of its own."""
    row_width: int | None = None
    """Size of the rows of items and users; None is the width of the model."""
    item_codes: bool = True
    """Describe items by the vectors of their codes, those that the decoder reads."""
    item_features: bool = False
    """Describe items by their feature vectors too (such as text embeddings)."""
    actions: bool = False
    """Describe events by their kind (column action)."""
    play_time: bool = False
    """Describe events by how long the item was played, and which share of it (play_time_s and duration_s)."""
    feedback_width: int = 16
    """Size of the vectors of kinds of action and of play times."""
    user_rows: int = 0
    """Rows of a hashed table of users, whose vector is a token of its own (static pathway); 0 is none."""
    short_length: int = 0
    """Latest events that stand in the context a second time (short-term pathway); 0 is none."""
    positive_length: int = 0
    """The same for the latest events with a positive action (positive-feedback pathway); 0 is none."""
    positive_actions: tuple[str, ...] = ()
    """Actions that say an item was liked."""

    def __post_init__(self) -> None:
        if not (self.item_rows or self.item_codes or self.item_features):
            raise ConfigError(
                "an item of the history needs a description; keep one of item-rows, item-codes and item-features on"
            )
        if bool(self.positive_length) != bool(self.positive_actions):
            raise ConfigError(
                "the positive-feedback pathway needs both positive-length and positive-actions, got "
                f"{self.positive_length} and {self.positive_actions}; give the other one too"
            )
        if min(self.hidden, self.feedback_width, 1 if self.row_width is None else self.row_width) < 1:
            raise ConfigError(
                "hidden, row-width and feedback-width of a context must be at least 1, got "
                f"{self.hidden}, {self.row_width} and {self.feedback_width}"
            )
        if min(self.user_rows, self.short_length, self.positive_length) < 0:
            raise ConfigError(
                "user-rows, short-length and positive-length must be 0 or more, got "
                f"{self.user_rows}, {self.short_length} and {self.positive_length}"
            )

    @property
    def event_columns(self) -> tuple[str, ...]:
        """Event columns that are read beside the items."""
        reads_actions = self.actions or self.positive_length
        return (ACTION,) * bool(reads_actions) + (PLAY_TIME, DURATION) * self.play_time

    @property
    def pathways(self) -> tuple[str, ...]:
        """Those that tokens are made for; the whole history always."""
        chosen = {USER: self.user_rows, SHORT: self.short_length, POSITIVE: self.positive_length, HISTORY: 1}
        return tuple(name for name, size in chosen.items() if size)


class UserContext(nn.Module):
    """One token of `dim` per pathway and event; they do not look at each other."""

    def __init__(
        self,
        config: ContextConfig,
        *,
        width: int,
        dim: int,
        dropout: float,
        num_items: int,
        item_feature_dim: int,
        semantic_ids: SemanticIds,
        actions: Sequence[str],
        init_scale: float,
    ):
        """`width` is that of the vectors of codes, `dim` that of the tokens."""
        super().__init__()
        self.config, self.num_items, self.init_scale = config, num_items, init_scale
        self.row_width = config.row_width or width
        self.codes_scale = width**0.5
        widths = [self.row_width] * config.item_rows + [width] * config.item_codes
        if config.item_features:
            self.feature_projection = Linear(item_feature_dim, self.row_width, bias=False)
            widths.append(self.row_width)
        self.features = EventFeatures(
            widths=widths,
            num_actions=len(actions) if config.actions else 0,
            play_time=config.play_time,
            feedback_width=config.feedback_width,
        )
        self.dropout = Dropout(dropout)
        sizes = dict.fromkeys(config.pathways, self.features.width) | {USER: self.row_width}
        self.pathways = nn.ModuleDict(
            {name: Pathway(sizes[name], config.hidden, dim) for name in config.pathways}
        )
        self.register_buffer("item_codes", semantic_ids.codes, persistent=False)
        self.positive_codes = codes_of("model.context.positive-actions", config.positive_actions, actions)

    def tables(self) -> list[TableSpec]:
        """Rows of items are needed where features come with them too."""
        parts = {"dim": self.row_width, "init_scale": self.init_scale, "placement": "row_wise"}
        items = TableSpec(name=ITEM_TABLE, num_rows=self.num_items, features=("history",), **parts)
        users = TableSpec(
            name=USER_TABLE,
            num_rows=UNBOUNDED,
            hash_rows=self.config.user_rows,
            features=("user",),
            rows_are_items=False,
            rows_are_users=True,
            **parts,
        )
        return [items] * self._reads_items + [users] * bool(self.config.user_rows)

    def ids(self, batch: SequenceBatch) -> Ids:
        items = {"history": batch.items.values} if self._reads_items else {}
        return {**items, "user": batch.user_ids} if self.config.user_rows else items

    def forward(self, rows: Rows, batch: SequenceBatch, codes: CodeEmbedding) -> ContextTokens:
        spans, vectors = self.spans(batch), self.vectors(rows, batch, codes)
        order = self.order(batch.items, spans)
        since, until = (order.arrange([span[end] for span in spans.values()]) for end in (0, 1))
        return ContextTokens(
            vectors=order.arrange([vectors[name] for name in spans]),
            places=order.places,
            since=since,
            until=until,
        )

    def order(self, items: Jagged, spans: Mapping[str, Span]) -> TokenOrder:
        """How the tokens of some pathways stand behind each other."""
        with_user = USER in spans
        return TokenOrder.build(items, with_user=with_user, num_pathways=len(spans) - with_user)

    def spans(self, batch: SequenceBatch) -> dict[str, Span]:
        """Since and until of the tokens of each pathway, from the columns of the batch alone."""
        items, found = batch.items, {}
        if USER in self.pathways:
            always = torch.zeros_like(batch.user_ids)
            found[USER] = (always, always + NEVER)
        if SHORT in self.pathways:
            found[SHORT] = latest(items, self.config.short_length)
        if POSITIVE in self.pathways:
            # One by one: a tensor of them would be sent to the device in the middle of every step.
            action = batch.features[ACTION]
            liked = torch.stack([action == code for code in self.positive_codes]).any(0)
            found[POSITIVE] = positive_feedback(items, liked, self.config.positive_length)
        return {**found, HISTORY: latest(items, None)}

    def vectors(self, rows: Rows, batch: SequenceBatch, codes: CodeEmbedding) -> dict[str, Tensor]:
        """Tokens of each pathway. Shapes: [B, dim] of users, [T, dim] of events."""
        features = self.dropout(self._describe(rows, batch, codes))
        found = {name: pathway(features) for name, pathway in self.pathways.items() if name != USER}
        if USER in self.pathways:
            user = self.dropout(rows["user"].rows * self.row_width**0.5)
            found[USER] = self.pathways[USER](user)
        return found

    @property
    def _reads_items(self) -> bool:
        return self.config.item_rows or self.config.item_features

    def _describe(self, rows: Rows, batch: SequenceBatch, codes: CodeEmbedding) -> Tensor:
        """Shapes: [T, features]."""
        vectors = []
        if self.config.item_rows:
            vectors.append(rows["history"].rows * self.row_width**0.5)
        if self.config.item_codes:
            vectors.append(codes(self.item_codes[batch.items.values]).sum(1) * self.codes_scale)
        if self.config.item_features:
            vectors.append(self._projected(rows["history"]))
        return self.features(vectors, batch.features)

    def _projected(self, found: LookedUp) -> Tensor:
        return self.feature_projection(found.item_features.float())


def codes_of(option: str, names: Sequence[str], actions: Sequence[str]) -> list[int]:
    """Codes of the actions that an option names. Raises: ConfigError where the data has no such action."""
    missing = [name for name in names if name not in actions]
    if missing:
        raise ConfigError(
            f"{option} must be actions of the data, and {', '.join(missing)} is none; it has "
            f"{', '.join(actions) or 'no actions'}; name some of those with "
            f"--{option}"
        )
    return [actions.index(name) for name in names]
