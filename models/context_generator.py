"""What the two OneRec models share: the context of a user, codes that go in, scores of codes that come out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data_streams.batch import SequenceBatch
from models.generator import DecodeState, Generator
from models.layers.code_decoder import CodeDecoder, KeyValues
from models.layers.code_embedding import CodeEmbedding
from models.layers.linear import Linear
from models.layers.norm import RMSNorm
from models.layers.shared_prompt_attention import PromptKeyValues, PromptLayout
from models.layers.user_context import ContextConfig, UserContext
from models.predicted_events import PREDICTED, check_targets_per_user, with_newest
from models.recommender import StepContext
from models.semantic_ids import SemanticIds
from models.tables import Ids, TableSpec


class ContextGenerator(Generator):
    """A decoder of [start, codes so far] that attends to what is known of the user."""

    decoder: CodeDecoder

    def __init__(
        self,
        config,
        *,
        token_dim: int,
        num_items: int,
        item_feature_dim: int,
        semantic_ids: SemanticIds,
        actions: Sequence[str] = (),
    ):
        """`config` has width, context, targets_per_user, dropout and init_scale; `token_dim` is that of tokens."""
        super().__init__()
        self.config = config
        self.code_sizes = semantic_ids.code_sizes
        self.uses_item_features = config.context.item_features
        self.register_buffer("item_codes", semantic_ids.codes, persistent=False)
        self.codes = CodeEmbedding(self.code_sizes, config.width)
        self.start = nn.Embedding(1, config.width)
        self.context = UserContext(
            config.context,
            width=config.width,
            dim=token_dim,
            dropout=config.dropout,
            num_items=num_items,
            item_feature_dim=item_feature_dim,
            semantic_ids=semantic_ids,
            actions=actions,
            init_scale=config.init_scale,
        )
        self.norms = nn.ModuleList(RMSNorm(config.width) for _ in self.code_sizes)
        self.heads = nn.ModuleList(Linear(config.width, size, bias=False) for size in self.code_sizes)

    def tables(self) -> list[TableSpec]:
        return self.context.tables()

    def training_batch(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        return with_newest(batch, self.config.targets_per_user)

    def num_targets(self, batch: SequenceBatch) -> int:
        return batch.supervision[PREDICTED].values.shape[0]

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        return self.prompt_ids(batch)

    def prompt_ids(self, batch: SequenceBatch) -> Ids:
        return self.context.ids(batch)

    def step(
        self, state: DecodeState, level: int, codes: Tensor | None, parents: Tensor | None
    ) -> tuple[Tensor, DecodeState]:
        if level == 0:
            return self.scores(0, state.last_hidden)[:, None], state
        state = state.reorder(parents)
        tokens = self.scaled(self.codes(codes[..., None], level - 1)[..., 0, :])
        hidden, suffix = self.decoder.extend(tokens, state.lengths, state.prompt, state.suffix)
        scores = self.scores(level, hidden.flatten(0, 1)).unflatten(0, codes.shape)
        return scores, state.with_suffix(suffix)

    def started(self, context: Sequence[KeyValues], layout: PromptLayout, lengths: Tensor) -> DecodeState:
        """The state once the start token was decoded. Shapes: lengths [B]."""
        prompt = tuple(PromptKeyValues.build(own.keys, own.values, layout) for own in context)
        nothing = [None] * len(self.decoder.blocks)
        tokens = self.scaled(self.starts(len(lengths)))
        hidden, suffix = self.decoder.extend(tokens, lengths, prompt, nothing)
        return DecodeState(last_hidden=hidden[:, 0], lengths=lengths, prompt=prompt, suffix=suffix)

    def starts(self, count: int) -> Tensor:
        """Shapes: [count, 1, D]."""
        return self.start(torch.zeros(count, 1, dtype=torch.int64, device=self.item_codes.device))

    def scaled(self, tokens: Tensor) -> Tensor:
        """As large as what blocks add to it, or the codes would hardly be heard."""
        return tokens * self.config.width**0.5

    def scores(self, level: int, hidden: Tensor) -> Tensor:
        """Shapes: [n, D] -> [n, K]."""
        return self.heads[level](self.norms[level](hidden))


class ContextGeneratorConfig:
    """What follows from the context of a configuration that has one."""

    context: ContextConfig
    targets_per_user: int | None
    needs_semantic_ids = True
    """Whether `build` is to be given the catalogue's semantic IDs."""
    has_own_objective = True
    """Whether the loss is the model's own."""

    @property
    def event_columns(self) -> tuple[str, ...]:
        """Event columns the model reads beside the items."""
        return self.context.event_columns

    @property
    def needs_actions(self) -> bool:
        """Whether `build` is to be given the names of the codes in the column `action`."""
        return "action" in self.event_columns

    @property
    def item_features(self) -> bool:
        """Whether items come with their feature vectors."""
        return self.context.item_features

    def check(self) -> None:
        """Raises: ConfigError where the options cannot work together."""
        check_targets_per_user(self.targets_per_user)
