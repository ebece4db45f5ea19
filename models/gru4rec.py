"""GRU4Rec: a recurrent network over the items of a session.

Source: Hidasi et al., Session-based Recommendations with Recurrent Neural Networks (2016), Hidasi and Karatzoglou,
Recurrent Neural Networks with Top-k Gains (2018), and the published code, in its mode of shared ("constrained")
embeddings: one table embeds inputs and scores outputs. Its losses are the objectives `sampled-softmax`, `bpr-max`,
`top1` and the like. Deviations: a step takes whole sessions side by side, in the order of the run, and gradients go
back to the session's first item, where the published code carries states from step to step as constants through slots
sorted by time; candidates are the shared negatives of the step without the other rows' targets; scores are cosines over
a temperature in the recipes (`--objective.no-normalised --objective.temperature 1` are the published products), and
embedded items are multiplied by the root of the width; no bias by item is added to scores, and no activation is put on
them; the optimizers are those of all recipes.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.item_sequence import ItemSequenceConfig, ItemSequenceModel
from models.layers.dropout import Dropout
from models.layers.recurrence import JaggedGRU
from models.tables import LookedUp


class GRU4Rec(ItemSequenceModel):
    """A retriever by the states of its last recurrent layer, without position vectors."""

    has_positions = False

    @dataclass(frozen=True, kw_only=True)
    class Config(ItemSequenceConfig):
        num_blocks: int = 1
        """Recurrent layers on top of each other."""
        dropout: float = 0.2
        """Dropout on the embedded input (`dropout_p_embed` of the published code)."""
        hidden_dropout: float = 0.0
        """Dropout on the states of each layer (`dropout_p_hidden`)."""

        def build(self, **parts: Any) -> "GRU4Rec":
            return GRU4Rec(self, **parts)

    def __init__(self, config: Config, **parts: Any):
        super().__init__(config, **parts)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))

    def embed_events(self, history: LookedUp, batch: SequenceBatch) -> Tensor:
        return self.input_dropout(self.scaled_items(history))

    def encode_events(self, hidden: Tensor, batch: SequenceBatch) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden, batch.items)
        return hidden


class Block(nn.Module):
    def __init__(self, config: GRU4Rec.Config):
        super().__init__()
        self.recurrence = JaggedGRU(config.width)
        self.dropout = Dropout(config.hidden_dropout)
        for name, weights in self.recurrence.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(weights)
                continue
            # Bounds by the size of one gate's matrix, as published, not by that of the three together.
            for gate in weights.data.chunk(3):
                nn.init.xavier_uniform_(gate)

    def forward(self, hidden: Tensor, sequences: Jagged) -> Tensor:
        """Shapes: hidden [T, D] -> [T, D]."""
        return self.dropout(self.recurrence(hidden, sequences))
