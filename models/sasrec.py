"""SASRec: a causal transformer over the user's items that predicts the next one at every position.

Source: Kang and McAuley, Self-Attentive Sequential Recommendation (2018), with the softmax objectives that later
work found to be decisive. Deviations: keys and values are normalised like the queries (plain pre-norm), their
projections have no bias (that of the keys would have no effect), no padding exists, and an item's vector may be
its row plus a projection of its frozen features, so that an item without any interaction has one too.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_streams.batch import SequenceBatch
from models.kernels.jagged_attention import BucketLayout, attention_layout, jagged_attention
from models.layers.dropout import Dropout
from models.layers.linear import Linear
from models.recommender import LossSum, Retriever, StepContext
from models.tables import Ids, LookedUp, Rows, TableSpec

ITEM_TABLE = "item"


class SASRec(Retriever):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        width: int = 64
        """Size of item vectors and of the residual stream."""
        num_blocks: int = 2
        """Transformer blocks."""
        num_heads: int = 2
        """Attention heads per block."""
        feedforward_width: int | None = None
        """Hidden size of the feed-forward part; None takes the width, as the paper does."""
        dropout: float = 0.2
        """Dropout on the input and on what each half of a block adds."""
        init_scale: float = 0.02
        """Standard deviation of the initial item rows and weights."""
        item_features: bool = False
        """Add a projection of the items' feature vectors (such as text embeddings) to their rows."""

        def build(
            self, *, num_items: int, max_length: int, item_feature_dim: int, objective: nn.Module
        ) -> "SASRec":
            return SASRec(self, num_items, max_length, item_feature_dim, objective)

    def __init__(
        self, config: Config, num_items: int, max_length: int, item_feature_dim: int, objective: nn.Module
    ):
        super().__init__()
        self.config, self.num_items = config, num_items
        self.uses_item_features = config.item_features
        self.objective = objective
        self.positions = nn.Embedding(max_length, config.width)
        self.input_dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.final_norm = nn.LayerNorm(config.width)
        if config.item_features:
            self.feature_projection = Linear(item_feature_dim, config.width, bias=False)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_scale)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def tables(self) -> list[TableSpec]:
        return [
            TableSpec(
                name=ITEM_TABLE,
                num_rows=self.num_items,
                dim=self.config.width,
                features=("history", *self.objective.features),
                init_scale=self.config.init_scale,
                placement="row_wise",
            )
        ]

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        return {**self.query_ids(batch), **self.objective.ids(batch.targets, context)}

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        hidden = self.encode(rows["history"], batch)
        vectors = {name: self.item_vectors(rows[name]) for name in self.objective.features}
        ids = {name: rows[name].ids for name in self.objective.features}
        return self.objective(self.objective.queries(hidden), batch.targets, vectors, ids, context)

    def encode(self, history: LookedUp, batch: SequenceBatch) -> Tensor:
        """The state after each event. Shapes: [T, D]."""
        within = torch.arange(batch.num_tokens, device=history.rows.device)
        within = within - batch.items.offsets[batch.items.row_index()]
        scaled = self._embed(history) * self.config.width**0.5
        hidden = self.input_dropout(scaled + self.positions(within))
        layout = attention_layout(batch.items)
        for block in self.blocks:
            hidden = block(hidden, layout)
        return self.final_norm(hidden)

    def query_ids(self, batch: SequenceBatch) -> Ids:
        return {"history": batch.items.values}

    def query(self, rows: Rows, batch: SequenceBatch) -> Tensor:
        last = batch.items.offsets[1:] - 1
        return self.objective.queries(self.encode(rows["history"], batch)[last])

    def item_ids(self, items: Tensor) -> Ids:
        return {"history": items}

    def item_vectors(self, rows: LookedUp) -> Tensor:
        return self.objective.candidates(self._embed(rows))

    def _embed(self, rows: LookedUp) -> Tensor:
        if not self.config.item_features:
            return rows.rows
        return rows.rows + self.feature_projection(rows.item_features.float())


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: SASRec.Config):
        super().__init__()
        hidden = config.feedforward_width or config.width
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.query_key_value = Linear(config.width, 3 * config.width, bias=False)
        self.attention_output = Linear(config.width, config.width)
        self.feedforward_norm = nn.LayerNorm(config.width)
        self.feedforward_input = Linear(config.width, hidden)
        self.feedforward_output = Linear(hidden, config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, hidden: Tensor, layout: BucketLayout) -> Tensor:
        """Shapes: hidden [T, D] -> [T, D]."""
        hidden = hidden + self.dropout(self._attend(self.attention_norm(hidden), layout))
        expanded = F.relu(self.feedforward_input(self.feedforward_norm(hidden)))
        return hidden + self.dropout(self.feedforward_output(expanded))

    def _attend(self, normalised: Tensor, layout: BucketLayout) -> Tensor:
        projected = self.query_key_value(normalised).unflatten(-1, (3, self.num_heads, -1))
        attended = jagged_attention(*projected.unbind(1), layout)
        return self.attention_output(attended.flatten(1))
