"""URM: one decoder as retriever of several objectives, asked by M query tokens in a single pass.

A prompt is the user's items, one token each, the objective (which action is wanted) as a token of its own or in words,
and M learnt query tokens. Their states, projected to the width of item vectors, are M queries, and an item's score is
its best product with them: score(u, o, v) = max_m <h_m W_h, w_v>. An item's vector is w_v = row + Linear(frozen
features), in a table of its own or that of the inputs. The prompts of a user share one copy of the history: each sees
what lies before it, and itself. From scratch, or from a language model on disk (`models.pretrained_decoder`).
With `reads_text` the objective is told in words, and what is known of the user stands in words in front of the history.

Source: URM (Alimama, 2025), arXiv 2502.03041. RECONSTRUCTED: query tokens are causal among each other; the layer that
makes a token of an item is linear; an item's vector is the sum of its row and the projected features; sampled softmax
with the correction for how often a negative is drawn; every position of a user is learnt at, or a few that are drawn,
each with the same weight in the loss; the words of an objective. Deviations: objectives are learnt tokens unless
`reads_text` says otherwise; no queries are in the data, so no loss over text is added; the profile stands in front of
the history and the objective behind it, so that one copy of the history serves all objectives; scores are cosines in
the recipe; the newest item may be added to the tokens behind the history; the search is exact where the paper walks a
graph of neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from models.drawn_positions import PLACES, check_positions, draw_positions, drawn_events, whole_histories
from models.kernels.page_attention import PageLayout
from models.layers.linear import Linear
from models.layers.vocabulary import Vocabulary, with_others
from models.objective_prompts import PromptLayout, make_prompter
from models.objectives.retrieval import RetrievalObjective
from models.pretrained_decoder import build_decoder
from models.recommender import LossSum, Retriever, StepContext
from models.tables import Ids, LookedUp, Rows, TableSpec
from models.texts import TextConfig, Texts

ITEM_TABLE, OUTPUT_TABLE = "item", "output"
HISTORY, ACTION = "history", "action"


class URM(Retriever):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        has_objectives: ClassVar[bool] = True
        reads_item_texts: ClassVar[bool] = False

        num_queries: int = 4
        """Query tokens per prompt (M); the best one counts for each item."""
        by_action: bool = False
        """Tell the model which action the target event has, so that it can be asked for one."""
        reads_text: bool = False
        """Tell the objectives in words and not by a token of each action, and what the data's user table says of the
        user. Needs the extra `hf`."""
        descriptions: tuple[str, ...] = ()
        """What is told of an action, as ACTION=WORDS; of the others it is "the next item to ACTION"."""
        text: TextConfig = field(default_factory=TextConfig)
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
            if self.descriptions and not (self.reads_text and self.by_action):
                raise ConfigError(
                    f"model.descriptions need --model.reads-text and --model.by-action, got {self.descriptions} without"
                )

        @property
        def needs_texts(self) -> bool:
            return self.reads_text

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
        texts: Texts | None = None,
    ):
        """`actions` are the data's, in the order of their codes; `asked` is what `query` is to find: one of them, or
        with `texts` anything that can be said.

        Raises: ConfigError where the objective cannot train several queries, no such action is known, or there is
        nothing to read.
        """
        super().__init__()
        if config.num_queries > 1 and not objective.takes_several_queries:
            raise ConfigError(
                f"model.num-queries {config.num_queries} needs --objective sampled-softmax, and the objective is "
                f"{type(objective).__name__}; take that, or --model.num-queries 1"
            )
        self.config, self.num_items, self.objective, self.texts = config, num_items, objective, texts
        self.uses_item_features = config.item_features
        self.prompter, self.asked = make_prompter(config, actions, asked, texts)
        longest, num_words = int(config.by_action), 0
        if texts is not None:
            longest, num_words = 2 * config.text.max_tokens, texts.vocabulary_size
        num_positions = longest + max_length + config.num_queries
        self.decoder = build_decoder(config, num_positions, num_words=num_words)
        width, read = self.decoder.width, item_feature_dim if config.item_features else 0
        self.item_projection = Linear(config.item_width + read, width)
        self.tokens = nn.Embedding(self.prompter.num_learnt, width)
        if num_words and not config.pretrained:
            self.vocabulary = Vocabulary(torch.randn(num_words, width) * config.init_scale)
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
        inputs, outputs = (HISTORY,), self.objective.features
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
        places, events = batch.supervision[PLACES], drawn_events(batch)
        objectives = (
            batch.target_features[ACTION][events] if self.config.by_action else torch.zeros_like(events)
        )
        prompts = self.prompter.lay_out(batch, places.with_values(places.values + 1), objectives.long())
        history = {HISTORY: batch.items.values, **prompts.as_ids()}
        return {**history, **self.objective.ids(batch.targets[events], context)}

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        vectors = {name: self.item_vectors(rows[name]) for name in self.objective.features}
        ids = {name: rows[name].ids for name in self.objective.features}
        return self.objective(self.ask(rows), batch.targets[drawn_events(batch)], vectors, ids, context)

    def query_ids(self, batch: SequenceBatch) -> Ids:
        whole = whole_histories(batch)
        prompts = self.prompter.lay_out(batch, whole, torch.full_like(whole.values, self.asked))
        return {HISTORY: batch.items.values, **prompts.as_ids()}

    def query(self, rows: Rows, batch: SequenceBatch) -> Tensor:
        return self.ask(rows)

    def ask(self, rows: Rows) -> Tensor:
        """The queries of the prompts that were laid out. Shapes: [P, M, D] fp32, or [P, D] for one query."""
        layout, items = PromptLayout.of(rows), self.item_tokens(rows[HISTORY])
        told = self.read(layout.profiles).to(items.dtype)
        history, prompts, visible = layout.order, layout.prompts, layout.visible
        known = torch.cat((told, items)).index_select(0, history.values)
        asked, prompt = self.read(prompts.values).to(items.dtype), prompts.row_index()
        if self.config.newest_item:
            newest = history.offsets[visible.row_index()] + visible.values - 1
            asked = asked + known.index_select(0, newest.index_select(0, prompt))
        places = torch.cat((history.places(), visible.values.index_select(0, prompt) + prompts.places()))
        hidden = self.decoder(torch.cat((known, asked)), places, PageLayout.build(history, prompts, visible))
        ends = torch.arange(-self.config.num_queries, 0, device=places.device)
        states = hidden[len(known) :][prompts.offsets[1:, None] + ends]
        queries = self.objective.queries(self.query_projection(states.flatten(0, 1)))
        return queries if self.config.num_queries == 1 else queries.unflatten(0, states.shape[:2])

    def read(self, symbols: Tensor) -> Tensor:
        """Learnt tokens and, behind those in number, words. Shapes: [S] -> [S, width]."""
        if self.texts is None:
            return self.tokens(symbols)
        vocabulary = self.decoder.vocabulary if self.config.pretrained else self.vocabulary
        num_learnt = self.tokens.num_embeddings
        learnt = self.tokens(symbols.clamp(max=num_learnt - 1))
        return with_others(learnt, symbols - num_learnt, vocabulary, self.texts.vocabulary_size)

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
