"""A small recommender with experts: what OneRec has in common with the tests of its layer."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from data_streams.batch import SequenceBatch
from models.item_sequence import ItemSequenceConfig, ItemSequenceModel
from models.kernels.jagged_attention import jagged_attention
from models.kernels.length_buckets import BucketLayout, bucket_layout
from models.layers.feedforward import FeedForwardConfig
from models.layers.linear import Linear
from models.layers.moe import MixtureConfig
from trainer.expert_balance import mixtures


class MixtureModel(ItemSequenceModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(ItemSequenceConfig):
        num_heads: int = 2
        feedforwards: tuple[FeedForwardConfig | MixtureConfig, ...] = (
            FeedForwardConfig(hidden=24),
            MixtureConfig(num_experts=4, hidden=24, num_shared=1, auxiliary_weight=0.1, z_weight=0.01),
            MixtureConfig(num_experts=6, top_k=1, hidden=16, score="sigmoid", bias_rate=0.03),
        )
        """Of the blocks from the first to the last."""
        favour_first_half: bool = False
        """Let no token choose an expert of the second half, by a bias that outweighs all scores."""

        def build(self, **parts: Any) -> "MixtureModel":
            return MixtureModel(self, **parts)

    def __init__(self, config: Config, **parts: Any):
        super().__init__(config, **parts)
        self.blocks = nn.ModuleList(Block(config, part) for part in config.feedforwards)
        self.final_norm = nn.LayerNorm(config.width)
        for layer in mixtures(self) if config.favour_first_half else ():
            layer.choice_bias[: len(layer.choice_bias) // 2] = 10.0

    def encode_events(self, hidden: Tensor, batch: SequenceBatch) -> Tensor:
        layout = bucket_layout(batch.items)
        for block in self.blocks:
            hidden = block(hidden, layout)
        return self.final_norm(hidden)


class Block(nn.Module):
    def __init__(self, config: MixtureModel.Config, feedforward: FeedForwardConfig | MixtureConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.query_key_value = Linear(config.width, 3 * config.width, bias=False)
        self.norm = nn.LayerNorm(config.width)
        self.feedforward = feedforward.build(config.width, init_scale=0.3)

    def forward(self, hidden: Tensor, layout: BucketLayout) -> Tensor:
        projected = self.query_key_value(hidden).unflatten(-1, (3, self.num_heads, -1))
        hidden = hidden + jagged_attention(*projected.unbind(1), layout).flatten(1)
        return hidden + self.feedforward(self.norm(hidden))
