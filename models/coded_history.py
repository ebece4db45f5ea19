"""What generators share that read a user's items as one token each: its codes and, if wanted, a row of its own."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.generator import Generator
from models.item_sequence import ITEM_TABLE
from models.kernels.length_buckets import bucket_layout
from models.layers.code_embedding import CodeEmbedding
from models.layers.dropout import Dropout
from models.layers.initialise import initialise
from models.layers.linear import Linear
from models.layers.transformer import FeedForward, TransformerBlock
from models.recommender import StepContext
from models.semantic_ids import SemanticIds
from models.tables import Ids, LookedUp, Rows, TableSpec


@dataclass(frozen=True, kw_only=True)
class CodedHistoryConfig:
    """Options of every model over a coded history."""

    needs_semantic_ids: ClassVar[bool] = True
    """Whether `build` is to be given the catalogue's semantic IDs."""
    has_own_objective: ClassVar[bool] = True
    """Whether the loss is the model's own."""

    width: int = 192
    """Size of the residual stream."""
    num_blocks: int = 4
    """Blocks over the items of a user."""
    num_heads: int = 4
    """Attention heads per block."""
    feedforward_width: int = 512
    """Hidden size of the feed-forward part."""
    dropout: float = 0.3
    """Dropout on the input and on what blocks add."""
    item_rows: bool = True
    """Add a trained row of its own to every item of the history; without, an item is its codes alone."""
    item_features: bool = False
    """Add a projection of the items' feature vectors (such as text embeddings)."""
    init_scale: float = 0.02
    """Standard deviation of the initial rows and weights."""

    def __post_init__(self) -> None:
        if self.item_features and not self.item_rows:
            raise ConfigError(
                "model.item-features are added to the items' rows; leave them out or keep model.item-rows on"
            )


class CodedHistory(Generator):
    """A causal transformer over items: the state after an event knows it and what came before."""

    def __init__(
        self,
        config: CodedHistoryConfig,
        *,
        num_items: int,
        max_length: int,
        item_feature_dim: int,
        semantic_ids: SemanticIds,
    ):
        super().__init__()
        self.config, self.num_items = config, num_items
        self.code_sizes = semantic_ids.code_sizes
        self.uses_item_features = config.item_features
        self.register_buffer("item_codes", semantic_ids.codes, persistent=False)
        self.codes = CodeEmbedding(self.code_sizes, config.width)
        self.positions = nn.Embedding(max_length, config.width)
        if config.item_features:
            self.feature_projection = Linear(item_feature_dim, config.width, bias=False)
        self.input_dropout = Dropout(config.dropout)
        self.history = Stack(config, config.num_blocks)

    def initialise(self) -> None:
        """To be called when all parts are there."""
        self.apply(partial(initialise, scale=self.config.init_scale))

    def tables(self) -> list[TableSpec]:
        if not self.config.item_rows:
            return []
        return [
            TableSpec(
                name=ITEM_TABLE,
                num_rows=self.num_items,
                dim=self.config.width,
                features=("history",),
                init_scale=self.config.init_scale,
                placement="row_wise",
            )
        ]

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        return self.prompt_ids(batch)

    def prompt_ids(self, batch: SequenceBatch) -> Ids:
        return {"history": batch.items.values} if self.config.item_rows else {}

    def encode(self, rows: Rows, batch: SequenceBatch) -> Tensor:
        """The state after each event. Shapes: [T, D]."""
        return self.history(self.input_dropout(self.embed_events(rows, batch)), batch.items)

    def embed_events(self, rows: Rows, batch: SequenceBatch) -> Tensor:
        """What each event begins with. Shapes: [T, D]."""
        items = batch.items
        own = self.own_vectors(rows["history"]) if self.config.item_rows else None
        return self.vectors(self.item_codes[items.values], own) + self.positions(items.places())

    def vectors(self, codes: Tensor, own: Tensor | None) -> Tensor:
        """What blocks read of codes and of what items have beside them. Shapes: [..., depth], [..., D] -> [..., D]."""
        summed = self.codes(codes).sum(-2)
        return (summed if own is None else summed + own) * self.config.width**0.5

    def own_vectors(self, found: LookedUp) -> Tensor:
        """What items have beside their codes. Shapes: [n, D]."""
        if not self.config.item_features:
            return found.rows
        return found.rows + self.feature_projection(found.item_features.float())


class Stack(nn.Module):
    """Causal blocks on top of each other and a last norm."""

    def __init__(self, config: CodedHistoryConfig, num_blocks: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            TransformerBlock(
                width=config.width,
                num_heads=config.num_heads,
                feedforward=FeedForward(config.width, config.feedforward_width),
                dropout=config.dropout,
            )
            for _ in range(num_blocks)
        )
        self.final_norm = nn.LayerNorm(config.width)

    def forward(self, hidden: Tensor, sequences: Jagged) -> Tensor:
        """Shapes: hidden [T, D] -> [T, D]."""
        layout = bucket_layout(sequences)
        for block in self.blocks:
            hidden = block(hidden, layout)
        return self.final_norm(hidden)


def fixed_length(tokens: Tensor) -> Jagged:
    """Rows of equal length. Shapes: tokens [N, L, ...] -> N rows of L values."""
    num_rows, length = tokens.shape[:2]
    return Jagged(
        values=tokens.flatten(0, 1),
        offsets=torch.arange(num_rows + 1, device=tokens.device) * length,
        max_length=length,
    )
