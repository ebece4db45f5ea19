"""What models share that read a user's items and recommend by inner product: all but the network in between.

An item's vector is its table row, to which a projection of its frozen features (such as a text embedding) may be
added, so that an item without any interaction has one too.
"""

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from data_streams.batch import SequenceBatch
from models.layers.dropout import Dropout
from models.layers.linear import Linear
from models.objectives.retrieval import RetrievalObjective
from models.recommender import LossSum, Retriever, StepContext
from models.tables import Ids, LookedUp, Rows, TableSpec

ITEM_TABLE = "item"


@dataclass(frozen=True, kw_only=True)
class ItemSequenceConfig:
    """Options of every model over a sequence of items."""

    width: int = 64
    """Size of item vectors and of the residual stream."""
    num_blocks: int = 2
    """Blocks on top of each other."""
    dropout: float = 0.2
    """Dropout on the input and on what blocks add."""
    init_scale: float = 0.02
    """Standard deviation of the initial item rows and weights."""
    item_features: bool = False
    """Add a projection of the items' feature vectors (such as text embeddings) to their rows."""


class ItemSequenceModel(Retriever):
    """Embeds the items of a user, lets `encode_events` mix them, and hands all states to the objective."""

    has_positions = True
    """Whether an event's place in its history, the oldest first, has a vector of its own."""

    def __init__(
        self,
        config: ItemSequenceConfig,
        *,
        num_items: int,
        max_length: int,
        item_feature_dim: int,
        objective: RetrievalObjective,
    ):
        super().__init__()
        self.config, self.num_items, self.max_length = config, num_items, max_length
        self.uses_item_features = config.item_features
        self.objective = objective
        if self.has_positions:
            self.positions = nn.Embedding(max_length, config.width)
        self.input_dropout = Dropout(config.dropout)
        if config.item_features:
            self.feature_projection = Linear(item_feature_dim, config.width, bias=False)

    @abstractmethod
    def encode_events(self, hidden: Tensor, batch: SequenceBatch) -> Tensor:
        """The state after each event, which sees no later one. Shapes: [T, D] -> [T, D]."""

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
        return self.encode_events(self.embed_events(history, batch), batch)

    def embed_events(self, history: LookedUp, batch: SequenceBatch) -> Tensor:
        """What `encode_events` begins with. Shapes: [T, D]."""
        return self.input_dropout(self.scaled_items(history) + self.positions(batch.items.places()))

    def scaled_items(self, history: LookedUp) -> Tensor:
        """Items as the network reads them. Shapes: [T, D]."""
        return self._embed(history) * self.config.width**0.5

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
