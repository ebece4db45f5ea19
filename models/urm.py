"""URM: one decoder as retriever of several objectives, asked by M query tokens in a single pass.

A prompt is the user's items, one token each, the token of an objective (which action is wanted) and M learnt query
tokens. Their states, projected to the width of item vectors, are M queries, and an item's score is its best product
with them: score(u, o, v) = max_m <h_m W_h, w_v>. An item's vector is w_v = row + Linear(frozen features), in a table of
its own or that of the inputs. The prompts of a user share one copy of the history: each sees what lies before it, and
itself. From scratch, or from a language model on disk (`models.pretrained_decoder`).

Source: URM (Alimama, 2025), arXiv 2502.03041. RECONSTRUCTED: query tokens are causal among each other; the layer that
makes a token of an item is linear; an item's vector is the sum of its row and the projected features; sampled softmax
with the correction for how often a negative is drawn; every position of a user is learnt at, or a few that are drawn,
each with the same weight in the loss. Deviations: objectives are learnt tokens and not text; no profile and no text is
read, and so no loss over text is added; scores are cosines in the recipe; the newest item may be added to the tokens
behind the history; the search is exact where the paper walks a graph of neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.answered_actions import EXPOSURE
from models.drawn_positions import PLACES, check_positions, draw_positions, drawn_events
from models.kernels.page_attention import PageLayout
from models.layers.linear import Linear
from models.objectives.retrieval import RetrievalObjective
from models.pretrained_decoder import build_decoder
from models.recommender import LossSum, Retriever, StepContext
from models.tables import Ids, LookedUp, Rows, TableSpec

ITEM_TABLE, OUTPUT_TABLE = "item", "output"
ACTION, CLICK = "action", "click"


class URM(Retriever):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        has_objectives: ClassVar[bool] = True

        num_queries: int = 4
        """Query tokens per prompt (M); the best one counts for each item."""
        by_action: bool = False
        """Tell the model by a token which action the target event has, so that it can be asked for one."""
        item_width: int = 64
        """Size of items' rows, as inputs and as outputs."""
        shared_rows: bool = False
        """Let an item have one row for both."""
        item_features: bool = False
        """Let the items' feature vectors (such as text embeddings) be read beside their rows, and add a projection of
        them to the output vectors."""
        positions: int | None = None
        """Positions drawn per user and step that are learnt at; None takes all."""
        newest_item: bool = False
        """Add the newest item's token to the tokens behind the history. Not in the paper: a small decoder from scratch,
        whose positions count from the oldest event, takes long to learn where the newest one stands."""
        pretrained: str = ""
        """Folder of a Hugging Face decoder (config.json, *.safetensors) to start from, whose own sizes then hold,
        without dropout; left out, from scratch with those below. Needs the extra `hf` and the folder in every use."""
        width: int = 64
        """Size of the residual stream."""
        num_blocks: int = 1
        """Blocks on top of each other."""
        num_heads: int = 2
        """Attention heads per block."""
        feedforward_width: int = 128
        """Hidden size of the feed-forward part."""
        dropout: float = 0.1
        """Dropout on the input and on what blocks add."""
        init_scale: float = 0.02
        """Standard deviation of the initial rows and tokens."""

        def __post_init__(self) -> None:
            if self.num_queries < 1:
                raise ConfigError(f"model.num-queries must be at least 1, got {self.num_queries}")
            check_positions(self.positions)

        @property
        def event_columns(self) -> tuple[str, ...]:
            """Event columns the model reads beside the items."""
            return (ACTION,) if self.by_action else ()

        @property
        def needs_actions(self) -> bool:
            return self.by_action

        def build(self, **parts: Any) -> "URM":
            return URM(self, **parts)

    def __init__(
        self,
        config: Config,
        *,
        num_items: int,
        max_length: int,
        item_feature_dim: int,
        objective: RetrievalObjective,
        actions: Sequence[str] = (),
        asked: str = "",
    ):
        """`actions` are the data's, in the order of their codes; `asked` is the one that `query` is to find.

        Raises: ConfigError where the objective cannot train several queries, or no such action is known.
        """
        super().__init__()
        if config.num_queries > 1 and not objective.takes_several_queries:
            raise ConfigError(
                f"model.num-queries {config.num_queries} needs --objective sampled-softmax, and the objective is "
                f"{type(objective).__name__}; take that, or --model.num-queries 1"
            )
        self.config, self.num_items, self.objective = config, num_items, objective
        self.uses_item_features = config.item_features
        self.asked = action_code(asked, actions, config.by_action)
        self.prompt_length = config.by_action + config.num_queries
        self.decoder = build_decoder(config, max_length + self.prompt_length)
        width, read = self.decoder.width, item_feature_dim if config.item_features else 0
        self.item_projection = Linear(config.item_width + read, width)
        # The tokens of the objectives stand behind those of the queries.
        self.tokens = nn.Embedding(config.num_queries + (len(actions) if config.by_action else 0), width)
        self.query_projection = Linear(width, config.item_width, bias=False)
        if config.item_features:
            self.feature_projection = Linear(item_feature_dim, config.item_width, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        if self.config.pretrained:
            self.decoder.initialise_like_vocabulary(self.tokens)
            return
        for vectors in (self.tokens, self.decoder.positions):
            nn.init.normal_(vectors.weight, std=self.config.init_scale)

    def tables(self) -> list[TableSpec]:
        shared = {
            "num_rows": self.num_items,
            "dim": self.config.item_width,
            "init_scale": self.config.init_scale,
            "placement": "row_wise",
        }
        inputs, outputs = ("history",), self.objective.features
        if self.config.shared_rows:
            return [TableSpec(name=ITEM_TABLE, features=(*inputs, *outputs), **shared)]
        return [
            TableSpec(name=ITEM_TABLE, features=inputs, **shared),
            TableSpec(name=OUTPUT_TABLE, features=outputs, **shared),
        ]

    def training_batch(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        return draw_positions(batch, context, self.config.positions)

    def num_targets(self, batch: SequenceBatch) -> int:
        return batch.supervision[PLACES].values.shape[0]

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        targets = batch.targets[drawn_events(batch)]
        return {**self.query_ids(batch), **self.objective.ids(targets, context)}

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        places, events = batch.supervision[PLACES], drawn_events(batch)
        actions = batch.target_features[ACTION][events].long() if self.config.by_action else None
        queries = self.ask(rows["history"], batch, places.with_values(places.values + 1), actions)
        vectors = {name: self.item_vectors(rows[name]) for name in self.objective.features}
        ids = {name: rows[name].ids for name in self.objective.features}
        return self.objective(queries, batch.targets[events], vectors, ids, context)

    def query_ids(self, batch: SequenceBatch) -> Ids:
        return {"history": batch.items.values}

    def query(self, rows: Rows, batch: SequenceBatch) -> Tensor:
        one_each = torch.arange(batch.num_users + 1, device=batch.items.offsets.device)
        whole = Jagged(values=batch.items.lengths, offsets=one_each, max_length=min(batch.num_users, 1))
        actions = torch.full_like(whole.values, self.asked) if self.config.by_action else None
        return self.ask(rows["history"], batch, whole, actions)

    def ask(self, history: LookedUp, batch: SequenceBatch, visible: Jagged, actions: Tensor | None) -> Tensor:
        """The queries of prompts that see so many of their user's events, each for an action.

        Shapes: visible [P], a row per user; actions [P], None where the model knows none -> [P, M, D] fp32, or [P, D]
        for one query.
        """
        items = self.item_tokens(history)
        tokens = self.prompt_tokens(len(visible.values), actions)
        if self.config.newest_item:
            newest = batch.items.offsets[visible.row_index()] + visible.values - 1
            tokens = tokens + items[newest, None]
        per_prompt = torch.arange(len(visible.values) + 1, device=visible.values.device) * self.prompt_length
        prompts = Jagged(values=tokens.flatten(0, 1), offsets=per_prompt, max_length=self.prompt_length)
        places = visible.values[:, None] + torch.arange(self.prompt_length, device=visible.values.device)
        hidden = self.decoder(
            torch.cat((items, prompts.values.to(items.dtype))),
            torch.cat((batch.items.places(), places.flatten())),
            PageLayout.build(batch.items, prompts, visible),
        )
        states = hidden[len(items) :].unflatten(0, places.shape)[:, -self.config.num_queries :]
        queries = self.objective.queries(self.query_projection(states.flatten(0, 1))).unflatten(
            0, states.shape[:2]
        )
        return queries[:, 0] if self.config.num_queries == 1 else queries

    def prompt_tokens(self, num_prompts: int, actions: Tensor | None) -> Tensor:
        """What stands behind the history: the objective, where the model knows any, and the query tokens.

        Shapes: actions [P] -> [P, prompt length, width].
        """
        numbers = torch.arange(self.config.num_queries, device=self.tokens.weight.device)
        numbers = numbers.expand(num_prompts, -1)
        if actions is not None:
            numbers = torch.cat((self.config.num_queries + actions[:, None], numbers), dim=1)
        return self.tokens(numbers)

    def item_tokens(self, rows: LookedUp) -> Tensor:
        """Items as the decoder reads them. Shapes: [n, width]."""
        if not self.config.item_features:
            return self.item_projection(rows.rows)
        return self.item_projection(torch.cat((rows.rows, rows.item_features.to(rows.rows.dtype)), dim=1))

    def item_ids(self, items: Tensor) -> Ids:
        return {self.objective.features[0]: items}

    def item_vectors(self, rows: LookedUp) -> Tensor:
        if not self.config.item_features:
            return self.objective.candidates(rows.rows)
        return self.objective.candidates(rows.rows + self.feature_projection(rows.item_features.float()))


def action_code(asked: str, actions: Sequence[str], by_action: bool) -> int:
    """The code of the action to be asked for; left open, that of clicks, or the first that is no exposure.

    Raises: ConfigError where the model does not know it.
    """
    known = [name for name in actions if name != EXPOSURE] if by_action else []
    if asked and asked not in known:
        raise ConfigError(
            f"evaluation.objective must be an action that a model with --model.by-action was trained for, of "
            f"{', '.join(known) or 'none'}; got {asked}"
        )
    if by_action and not known:
        raise ConfigError(
            f"model.by-action needs data with actions, and the data has {', '.join(actions) or 'none'}; build it with "
            "--sequence-actions, or leave the option out"
        )
    return actions.index(asked or (CLICK if CLICK in known else known[0])) if known else 0
